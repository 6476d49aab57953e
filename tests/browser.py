"""A headless Chromium for the tests, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge import process

_LISTENS = re.compile(r"DevTools listening on (ws://\S+)")


class Page:
    """A tab. `run` evaluates JavaScript, `type` is a person at the keyboard."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def tell(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session := getattr(self, "_session", None):
            message["sessionId"] = session
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def run(self, expression: str) -> Any:
        return self.tell("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < deadline, (expression, self.run("document.body.innerText"))
            time.sleep(0.1)

    def open(self, url: str) -> None:
        self.tell("Page.navigate", url=url)

    def type(self, text: str) -> None:
        self.tell("Input.insertText", text=text)

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.tell("Input.dispatchKeyEvent", type="keyDown", **key)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **key)

    def picture(self) -> bytes:
        """The page as a PNG."""
        return base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser(width: int = 1000, height: int = 640) -> Iterator[Page]:
    """A tab of a fresh Chromium, which is gone afterwards with all that it wrote."""
    import websocket

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="forge-browser-", ignore_cleanup_errors=True) as home:
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += [f"--user-data-dir={home}/profile", f"--window-size={width},{height}", "--no-first-run"]
        command += ["--disable-background-networking", "--remote-allow-origins=*", "about:blank"]
        with process.Child(command, environment={"HOME": home}) as child:
            address = next(found[1] for line in child.lines() if (found := _LISTENS.search(line)))
            socket = websocket.create_connection(address, timeout=60)
            try:
                yield Page(socket)
            finally:
                socket.close()


def size_of(picture: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")

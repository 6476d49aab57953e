"""A pytest plugin: a test that is not marked fails when it opens a socket or starts a program.

`network` allows sockets on the loopback, nothing further; `programs` allows starting programs. An
audit hook sees every attempt of this process, whichever library makes it, stops it, and the
test fails even if the code under test swallowed what the hook raised.

Not covered: what a started program does, and sockets that C libraries open by themselves.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator

import pytest

_SOCKETS = {"socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
_PROGRAMS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"}
_MARKS = {**dict.fromkeys(_SOCKETS, "network"), **dict.fromkeys(_PROGRAMS, "programs")}


class _Watch:
    """What the running test may do, and what it did although it may not."""

    item: pytest.Item | None = None
    refused: list[str]

    def __init__(self) -> None:
        self.refused = []

    def see(self, event: str, args: tuple[object, ...]) -> None:
        mark = _MARKS.get(event)
        if mark is None or self.item is None or _is_renderer(args):
            return
        if self.item.get_closest_marker(mark) is None:
            self._refuse(f"{event} in a test that is not marked {mark!r}: {_shown(args)}")
        elif mark == "network" and not _is_local(event, args):
            self._refuse(f"{event} beyond the loopback: {_shown(args)}")

    def _refuse(self, message: str) -> None:
        self.refused.append(message)
        # Not an `Exception`: what guards against a broken network must not take it for one.
        raise pytest.fail.Exception(message)


def _is_renderer(args: tuple[object, ...]) -> bool:
    """The process that renders chat templates is a part of this one; whichever test is first starts it."""
    command = args[1] if len(args) > 1 else ()
    return isinstance(command, list) and command[-1:] == ["forge.chat.render_process"]


def _shown(args: tuple[object, ...]) -> str:
    return ", ".join(str(arg)[:200] for arg in args if isinstance(arg, str | bytes | tuple | list))


def _is_local(event: str, args: tuple[object, ...]) -> bool:
    address = args[0] if event.startswith("socket.gethost") or event == "socket.getaddrinfo" else args[1]
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return str(host).startswith(("/", "\0"))  # a socket in the file system


_watch = _Watch()
sys.addaudithook(_watch.see)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watch a test from its set-up to its tear-down."""
    _watch.item = item
    _watch.refused.clear()
    try:
        return (yield)
    finally:
        _watch.item = None


def _told() -> Iterator[None]:
    try:
        return (yield)
    finally:
        refused = list(_watch.refused)
        _watch.refused.clear()
        if refused:
            pytest.fail("\n".join(refused), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    return (yield from _told())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    return (yield from _told())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Iterator[None]:
    return (yield from _told())

"""A small Hugging Face Hub on the loopback: the routes that downloads and pushes need, and its ways to fail.

A real HTTP server over real files in memory: repository info, file trees, `resolve` with ETag,
commit and ranges, gates and tokens. `requests` and `ranges` tell what was asked. A push is as huggingface_hub
sends it with HF_HUB_DISABLE_XET: LFS objects first, then one commit. Not covered: Xet, LFS redirects, uploads
in several parts.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class StandInRepository:
    """One repository with one commit; `main` and the names in `branches` point to it."""

    files: Mapping[str, bytes]
    branches: tuple[str, ...] = ("main",)
    gated: bool = False
    """Files need a token of the hub's `accepted` set; the information does not."""
    private: bool = False
    """Nothing is told without such a token."""

    @functools.cached_property
    def commit(self) -> str:
        told = json.dumps({name: _oid(data) for name, data in self.files.items()})
        return hashlib.sha1(told.encode(), usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """The stand-in; use it as a context manager, `url` is its address."""

    repositories: dict[str, StandInRepository] = field(default_factory=dict)
    """By path: `organisation/name`, for data `datasets/organisation/name`."""
    accepted: set[str] = field(default_factory=set)
    down: int = 0
    """If set, every request is answered with this status."""
    breaks: dict[str, list[int]] = field(default_factory=dict)
    """File name -> after how many bytes its next downloads break off, one after the other."""
    writers: set[str] = field(default_factory=set)
    """The tokens that may push."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded, by its sha256."""
    refused_uploads: int = 0
    """So many of the next uploads are answered with 500."""
    seconds_per_mebibyte: float = 0.0
    """How slowly files are sent."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    """The `Range` headers of downloads, in order."""

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The files whose bytes were asked for, in order."""
        return [
            path.rpartition("/")[2]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._push()

    def do_PUT(self) -> None:
        self._push()

    def _push(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if self.command == "PUT":
            self._take(path.rpartition("/")[2], content)
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path == "api/validate-yaml":
            known = "license: " in json.loads(content)["content"].split("---\n")[1]
            self._tell({} if known else {"errors": [{"message": "license"}]}, 200 if known else 400)
        elif token not in self.hub.writers:
            self._refuse(403 if token else 401, "", "You don't have the rights to push")
        elif path == "api/repos/create":
            self._create(json.loads(content))
        elif path.endswith("/info/lfs/objects/batch"):
            self._tell({"transfer": "basic", "objects": list(self._objects(json.loads(content)["objects"]))})
        elif "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": _mode(one["path"]), "shouldIgnore": False, "oid": None}
                for one in json.loads(content)["files"]
            ]
            self._tell({"files": files})
        else:
            self._commit(path.removeprefix("api/models/").partition("/commit/")[0], content)

    def _tell(self, fields: object, status: int = 200) -> None:
        body = json.dumps(fields).encode()
        self._answer(status, body, Content_Type="application/json")

    def _create(self, fields: Mapping[str, str]) -> None:
        place = f"{fields['organization']}/{fields['name']}"
        if place in self.hub.repositories:
            self._tell(
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{place}"}, 409
            )
            return
        private = fields.get("visibility") == "private"
        self.hub.repositories[place] = StandInRepository({}, private=private)
        self._tell({"url": f"{self.hub.url}/{place}"})

    def _objects(self, asked: Iterable[Mapping[str, object]]) -> Iterator[dict[str, object]]:
        for one in asked:
            there = one["oid"] in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
            yield {**one} if there else {**one, "actions": upload}

    def _take(self, oid: str, content: bytes) -> None:
        if self.hub.refused_uploads:
            self.hub.refused_uploads -= 1
            self._answer(501, b"broken off")
            return
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self._answer(200)

    def _commit(self, place: str, content: bytes) -> None:
        lines = [json.loads(line) for line in content.splitlines()]
        files = dict(self.hub.repositories[place].files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        private = self.hub.repositories[place].private
        self.hub.repositories[place] = made = StandInRepository(files, private=private)
        self._tell({"commitUrl": f"{self.hub.url}/{place}/commit/{made.commit}", "commitOid": made.commit})

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `requests` has it all."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self._write(body)

    def _write(self, body: bytes) -> None:
        pause = self.hub.seconds_per_mebibyte
        step = 2**20 if pause else max(1, len(body))
        with contextlib.suppress(ConnectionError):  # Whoever asked has gone.
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                time.sleep(pause)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self._answer(status, body, X_Error_Code=code, X_Error_Message=message)

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if self.hub.down:
            self._answer(self.hub.down, b"the hub is down")
            return
        is_api = path.startswith("api/")
        place, rest = self._repository(path.removeprefix("api/").removeprefix("models/"))
        repository = self.hub.repositories.get(place)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.private and token not in self.hub.accepted):
            # The real hub says 401 for both when nobody is logged in: it does not tell what exists.
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif is_api:
            self._information(place, repository, rest)
        elif repository.gated and token not in self.hub.accepted:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {place} is restricted")
        else:
            self._file(repository, *rest)

    def _repository(self, path: str) -> tuple[str, list[str]]:
        parts = path.split("/")
        count = 3 if parts[0] == "datasets" else 2
        return "/".join(parts[:count]), parts[count:]

    def _known(self, repository: StandInRepository, revision: str) -> bool:
        if revision in (*repository.branches, repository.commit):
            return True
        self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return False

    def _information(self, place: str, repository: StandInRepository, rest: list[str]) -> None:
        what, revision = (rest[0], rest[1]) if rest else ("revision", "main")
        if not self._known(repository, revision):
            return
        files = [
            {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": _oid(data)}
            for name, data in repository.files.items()
        ]
        if what == "tree":
            told: object = files
        else:
            told = {
                "id": place.removeprefix("datasets/"),
                "sha": repository.commit,
                "siblings": files,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
            }
        self._answer(200, json.dumps(told).encode(), Content_Type="application/json")

    def _file(self, repository: StandInRepository, resolve: str, revision: str, *name: str) -> None:
        if not self._known(repository, revision):
            return
        data = repository.files.get("/".join(name))
        if resolve != "resolve" or data is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"ETag": f'"{_oid(data)}"', "X_Repo_Commit": repository.commit, "Accept_Ranges": "bytes"}
        asked = self.headers.get("Range", "")
        if self.command == "GET" and asked:
            self.hub.ranges.append(asked)
        if not asked:
            self._send(200, "/".join(name), data, headers)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data) - 1), len(data) - 1)
        headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
        self._send(206, "/".join(name), data[start : end + 1], headers)

    def _send(self, status: int, name: str, body: bytes, headers: Mapping[str, str]) -> None:
        breaks = self.hub.breaks.get(name)
        if self.command == "GET" and breaks:
            self._answer(status, body[: breaks.pop(0)], **headers, Content_Length=str(len(body)))
            self.close_connection = True
        else:
            self._answer(status, body, **headers, Content_Length=str(len(body)))


def _mode(name: str) -> str:
    return "lfs" if name.endswith((".gguf", ".safetensors")) else "regular"


@functools.cache
def _oid(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()

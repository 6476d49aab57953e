"""The guard itself: a test that opens a socket or starts a program without its mark fails. Style row 15."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forge import process

TESTS = """
import contextlib, os, socket, subprocess, sys, threading, urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
import pytest

def test_connects(): socket.create_connection(("127.0.0.1", 9), timeout=1)
def test_listens(): socket.create_server(("127.0.0.1", 0))
def test_swallows_it():
    with contextlib.suppress(BaseException): socket.create_server(("127.0.0.1", 0))
def test_looks_up_a_name(): socket.getaddrinfo("example.org", 80)
def test_starts_a_program(): subprocess.run([sys.executable, "-c", ""])
def test_forks(): os.fork() or os._exit(0)
def test_in_a_thread():
    thread = threading.Thread(target=lambda: contextlib.suppress(BaseException).__enter__() or start())
    thread.start(); thread.join()
def start():
    with contextlib.suppress(BaseException): subprocess.Popen([sys.executable, "-c", ""])
@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as made: yield made
def test_with_a_fixture(server): pass

@pytest.mark.network
def test_goes_far(): socket.create_connection(("192.0.2.1", 9), timeout=1)
@pytest.mark.network
def test_listens_to_everyone(): socket.create_server(("0.0.0.0", 0))
@pytest.mark.network
def test_marked_for_the_network_only(): subprocess.run([sys.executable, "-c", ""])
@pytest.mark.programs
def test_marked_for_programs_only(): socket.create_server(("127.0.0.1", 0))

@pytest.mark.network
def test_fine_loopback():
    server = HTTPServer(("localhost", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.handle_request).start()
    with socket.create_connection(server.server_address) as connection:
        connection.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        assert connection.recv(9)
    server.server_close()
@pytest.mark.network
def test_fine_fixture(server): assert server.getsockname()[0] == "127.0.0.1"
@pytest.mark.programs
def test_fine_program(): subprocess.run([sys.executable, "-c", ""], check=True)
def test_fine_pair():
    one, two = socket.socketpair()
    one.close(); two.close()
"""


@pytest.mark.programs
def test_unmarked_strays_fail_and_marked_tests_pass(tmp_path: Path) -> None:
    (tmp_path / "test_strays.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = network\n  programs\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.guard",
        "-p",
        "no:cacheprovider",
        "-rA",
        "--tb=short",
    ]
    finished = process.run(
        [*command, f"--rootdir={tmp_path}", str(tmp_path)], directory=Path(__file__).parent.parent
    )
    lines = [line.split() for line in finished.output.splitlines()]
    summary = {line[1].rpartition("::")[2]: line[0] for line in lines if len(line) > 1 and "::" in line[1]}
    fine = {name for name in summary if "fine" in name}
    assert len(fine) == 4 and len(summary) == 16, finished.output
    assert {name for name, result in summary.items() if result == "PASSED"} == fine, finished.output
    assert "socket.bind in a test that is not marked 'network'" in finished.output
    assert "socket.getaddrinfo beyond the loopback: 192.0.2.1" in finished.output

"""Programs are started one way, end with their parent, inherit nothing, and stop when asked."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from forge import process
from forge.errors import MissingToolError

pytestmark = pytest.mark.programs
ROOT = Path(__file__).parent.parent

# Says its own pid and that of the child it starts, and waits for ever.
CHAIN = """
import os, sys, time
from forge import process
depth = int(sys.argv[1])
print(os.getpid(), flush=True)
if depth:
    with process.Child([sys.executable, __file__, str(depth - 1)]) as child:
        for line in child.lines():
            print(line, flush=True)
else:
    print("all up", flush=True)
    time.sleep(600)
"""


def wait_until_gone(pids: list[int], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_line_in_the_log_can_be_pasted(tmp_path: Path) -> None:
    command = python("import os, sys; print(sys.argv[1:], os.getcwd())")
    command += ["two words", "it's", "$HOME", "*", ""]
    directory = tmp_path / "a dir'"
    directory.mkdir()
    line = process.pasteable(command, directory)
    there = process.run(command, directory=directory)
    pasted = process.run(["sh", "-c", line])
    assert pasted == there
    assert there.output == f"['two words', \"it's\", '$HOME', '*', ''] {directory}"


def test_run_gives_status_and_output_and_logs_both(tmp_path: Path) -> None:
    log, heard = io.StringIO(), list[str]()
    command = python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")
    finished = process.run(command, log=log, on_line=heard.append, environment={"PYTHONUNBUFFERED": "1"})
    assert finished == process.Finished(3, "out\nerr")
    assert heard == ["out", "err"]
    assert log.getvalue() == f"$ {process.pasteable(command)}\nout\nerr\n"


def test_output_comes_live() -> None:
    with process.Child(python("print('ready', flush=True); import time; time.sleep(600)")) as child:
        started = time.monotonic()
        assert next(child.lines()) == "ready"
        assert time.monotonic() - started < 60 and child.status is None


def test_errors_apart_leave_standard_output_clean(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        command = python("import sys; print('noise', file=sys.stderr); print('{}')")
        with process.Child(command, log=log, separate_errors=True) as child:
            assert list(child.lines()) == ["{}"]
            assert child.wait() == 0
    assert (tmp_path / "log").read_text().splitlines()[1:] == ["noise"]


def test_bytes_that_are_no_text_do_no_harm() -> None:
    finished = process.run(python(r"import os; os.write(1, b'\xff ok\n')"))
    assert finished == process.Finished(0, "\N{REPLACEMENT CHARACTER} ok")


@pytest.mark.parametrize("name", ["no-such-program", "./no-such-program"])
def test_a_program_that_is_not_there_is_a_missing_tool(name: str) -> None:
    with pytest.raises(MissingToolError, match=f"there is no program {name}") as caught:
        process.run([name, "--help"])
    assert caught.value.hint and caught.value.code == 3


def test_a_program_beside_its_directory_is_found(tmp_path: Path) -> None:
    script = tmp_path / "hello"
    script.write_text("#!/bin/sh\necho hello\n")
    script.chmod(0o755)
    assert process.run(["./hello"], directory=tmp_path).output == "hello"
    assert process.run(["hello"], environment={"PATH": f"{tmp_path}:/bin"}).output == "hello"


def test_stop_asks_first(tmp_path: Path) -> None:
    # Written past Python's buffer: the signal may come while that is still being emptied.
    code = "import os, signal, sys, time\n"
    code += "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'tidy\\n'), sys.exit(7)))\n"
    code += "print('up', flush=True); time.sleep(600)"
    with process.Child(python(code)) as child:
        lines = child.lines()
        next(lines)
        child.terminate()
        assert list(lines) == ["tidy"]
        assert child.stop() == 7


def test_what_does_not_listen_is_killed_with_its_session() -> None:
    code = "import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "pid = os.fork()\nprint(os.getpid(), pid, flush=True) if pid else None\ntime.sleep(600)"
    with process.Child(python(code)) as child:
        pids = [int(pid) for pid in next(child.lines()).split()]
        started = time.monotonic()
        assert child.stop(grace=0.3) == -signal.SIGKILL
        assert 0.3 <= time.monotonic() - started < 30
    wait_until_gone(pids)


def test_a_second_interrupt_while_waiting_kills_at_once() -> None:
    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    code += "print(flush=True); time.sleep(600)"
    child = process.Child(python(code))
    next(child.lines())
    threading.Timer(0.5, lambda: signal.raise_signal(signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        child.stop(grace=600)
    assert child.wait(10) == -signal.SIGKILL


def test_leaving_the_block_by_an_error_stops_it() -> None:
    with pytest.raises(ZeroDivisionError):
        with process.Child(python("import time; time.sleep(600)")) as child:
            raise ZeroDivisionError
    assert child.status == -signal.SIGTERM


def test_to_send_to_one_that_has_gone_is_no_error() -> None:
    with process.Child(python("")) as child:
        child.wait()
        child.send("hello\n" * 10000)


def test_children_and_their_children_die_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "chain.py"
    script.write_text(CHAIN)
    with process.Child([sys.executable, str(script), "3"], environment={"PYTHONPATH": str(ROOT)}) as first:
        lines = first.lines()
        pids = [int(next(lines)) for _ in range(4)]
        assert next(lines) == "all up"
        assert len(set(pids)) == 4 and all(map(_runs, pids))
        os.kill(pids[0], signal.SIGKILL)
        wait_until_gone(pids)


def test_the_end_of_the_pipe_ends_a_python_child() -> None:
    """What works without Linux's signal: the child watches the pipe that its parent held."""
    code = f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from forge import process\n"
    code += "process.exit_with_parent(sys.stdin); print('up', flush=True); time.sleep(600)"
    with process.Child(python(code)) as child:
        next(child.lines())
        child.send("more text does not end it\n")
        assert not child.ends_within(0.3)
        stream = child._process.stdin
        assert stream
        stream.close()
        assert child.wait(60) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_open_is_inherited(tmp_path: Path) -> None:
    import filelock

    with filelock.FileLock(tmp_path / "a.lock"), (tmp_path / "b.txt").open("w"):
        listing = "import os; print(sorted(os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2)), "
        listing += "sorted(map(int, os.listdir('/proc/self/fd'))))"
        seen = process.run(python(listing)).output
    assert "a.lock" not in seen and "b.txt" not in seen
    assert "[0, 1, 2, 3]" in seen, "3 is the directory that it reads"


def test_a_ctrl_c_of_the_terminal_reaches_the_parent_alone() -> None:
    with process.Child(python("import os; print(os.getpgid(0), os.getsid(0), flush=True); input()")) as child:
        assert next(child.lines()).split() == [str(child.pid)] * 2
        assert child.pid != os.getpgid(0)


def test_sigterm_becomes_the_interrupt_inside_the_block_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), process.signals_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before

"""`forge doctor`: the machine, a message, a log file, and the hint of a stage that failed (S1, H2)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import httpx
import pytest

from forge.cli.main import run_command
from forge.commands.doctor import _surroundings
from forge.errors import StageError
from tests.json_fields import check_fields
from tests.test_diagnosis import KNOWN, UNKNOWN


def _last(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    value: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return value


@pytest.mark.training
@pytest.mark.programs
@pytest.mark.network
def test_the_machine_is_looked_at(
    forge_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A1, H2: bitsandbytes multiplies one matrix; driver and torch are of one CUDA; a hub that is away."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text(
        '#!/bin/sh\n[ $# = 0 ] && echo "| Driver Version: 550.54 CUDA Version: 12.4 |" || echo "L4, 550.54"\n'
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert run_command(["doctor", "--json"]) == 0
    shown = _last(capsys)
    check_fields(["doctor"], shown)
    checks = {check["name"]: check for check in shown["checks"]}  # type: ignore[attr-defined]
    assert checks["converters"]["ok"] and checks["torch"]["ok"] and checks["memory"]["ok"]
    assert checks["bitsandbytes"]["ok"] and "4-bit layers compute in" in checks["bitsandbytes"]["detail"]
    gpu = checks["GPU"]
    assert gpu["ok"] or "none that torch sees (L4, 550.54; CUDA 12.4 in the driver, " in gpu["detail"]
    assert not checks["hub"]["ok"] and "http://127.0.0.1:9 does not answer" in checks["hub"]["detail"]


@pytest.mark.training
@pytest.mark.programs
@pytest.mark.network
def test_what_every_ship_needs_is_exit_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORGE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run_command(["doctor", "--json"]) == 3
    told = _last(capsys)
    assert any(check["detail"] == "not asked (offline)" for check in told["checks"])  # type: ignore[attr-defined]
    assert "converters" in told["error"]["message"] and "forge setup" in told["error"]["hint"]  # type: ignore[index]
    assert any(not check["ok"] and check["needed"] for check in told["checks"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "value"),
    [("SSL_CERT_FILE", "/nonexistent"), ("HTTPS_PROXY", "foo://x"), ("ALL_PROXY", "foo://x")],
)
def test_settings_that_no_request_can_be_made_with_are_no_bug(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setattr("forge.commands.doctor.is_offline", lambda: False)
    monkeypatch.setenv(name, value)
    (hub,) = [check for check in _surroundings() if check.name == "hub"]
    assert not hub.ok and "does not answer: " in hub.detail


@pytest.mark.parametrize(("status", "ok"), [(200, True), (404, True), (407, False), (503, False)])
def test_a_proxy_that_answers_for_the_hub_is_not_the_hub(
    status: int, ok: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.commands.doctor.is_offline", lambda: False)
    monkeypatch.setattr(httpx, "head", lambda *_, **__: httpx.Response(status))
    (hub,) = [check for check in _surroundings() if check.name == "hub"]
    assert hub.ok is ok


def test_a_message_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "RuntimeError: CUDA error: device-side assert triggered"]) == 0
    told = capsys.readouterr().out
    assert "cause:" in told and "remedy: train.max_length" in told


def test_a_message_that_is_not_known_is_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", ""]) == 2
    capsys.readouterr()
    assert run_command(["doctor", "the moon is full", "--json"]) == 2
    told = _last(capsys)
    assert told["matches"] == [] and "log.txt" in told["error"]["hint"]  # type: ignore[index]


def test_a_log_file_is_read_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "train.log"
    log.write_bytes("\n".join([*UNKNOWN, KNOWN[0], KNOWN[0], "\udcff"]).encode(errors="surrogateescape"))
    assert run_command(["doctor", str(log), "--json"]) == 0
    matches = _last(capsys)["matches"]
    assert isinstance(matches, list) and len(matches) == 1
    assert (matches[0]["line"], matches[0]["count"]) == (len(UNKNOWN) + 1, 2)
    assert matches[0]["source"] == "torch"


@pytest.mark.slow
def test_a_large_log_takes_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """100 MB, and one line of 20 MB in it."""
    log = tmp_path / "large.log"
    with log.open("w", encoding="utf-8") as file:
        for number in range(800_000):
            file.write(
                f"{{'loss': {number / 7:.6f}, 'grad_norm': 0.71, 'learning_rate': 0.0002, 'epoch': 0.12}}\n"
            )
        file.write("x" * 20_000_000 + "\n" + KNOWN[2] + "\n")
    assert run_command(["doctor", str(log), "--json"]) == 0
    assert _last(capsys)["matches"][0]["line"] == 800_002  # type: ignore[index]


def test_a_failed_stage_says_what_is_known_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line's edge asks the table: here of an error as a worker's comes out of `forge doctor`."""

    def fail(*_: object, **__: object) -> None:
        raise StageError("train failed: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("forge.commands.doctor.explain", fail)
    assert run_command(["doctor", "x"]) == 4
    assert "train.gradient_checkpointing" in capsys.readouterr().err

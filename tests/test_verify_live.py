"""The live hand-over, with the real llama-server: a sound one passes, another file or setting is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.vendor_chain import quantize
from forge.model.gguf_header import read_gguf
from forge.serve.embedded import serve_embedded
from forge.serve.live import LiveProof
from forge.serve.live_proof import prove_live
from forge.serve.runtime import ServerSettings
from forge.verify.measurement import Gates, Measurement
from forge.verify.verdict import Certificate, judge
from tests.models import PEFT_WARNS
from tests.specimens import Specimen, make_specimen, merged_tensors, rewrite

pytestmark = [
    pytest.mark.training, pytest.mark.programs, pytest.mark.network, pytest.mark.slow,
    pytest.mark.timeout(1500), PEFT_WARNS,
]  # fmt: skip

QUESTIONS = [[{"role": "user", "content": "There is bacon in this sandwich."}]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Specimen, Path, Measurement]:
    specimen = make_specimen(tmp_path_factory.mktemp("live") / "llama", max_position_embeddings=2048)
    file = specimen.f16(specimen.scratch / "f16")
    return specimen, file, specimen.measure(file)


def _live(
    file: Path, found: Measurement, log: Path, *, context: int = 512, asked: int = 512, of: Path | None = None
) -> LiveProof:
    """`file` is served; `of` is the one that was measured."""
    with serve_embedded(ServerSettings(file, "yoda", context, parallel=1, threads=1), log=log) as endpoint:
        return prove_live(
            endpoint,
            QUESTIONS,
            expected=found.live,
            file_type=found.file.type,
            weight_bytes=read_gguf(of or file).weight_bytes,
            sampling=found.file.sampling,
            context_tokens=asked,
            longest_tokens=300,
        )


def _judged(found: Measurement, live: LiveProof) -> Certificate:
    return judge(found, Gates(), live)


def test_the_file_that_was_measured(measured: tuple[Specimen, Path, Measurement], tmp_path: Path) -> None:
    _, file, found = measured
    live = _live(file, found, tmp_path / "log.txt")
    assert live.problems == ()
    assert live.handover.ok and live.handover.kl_mean < 1e-3
    assert 8 <= live.handover.prompts <= len(found.live) == 16
    assert live.failure() is None
    certificate = _judged(found, live)
    assert certificate.ok
    plain: Mapping[str, Any] = certificate.plain()
    assert plain["handovers"][-1]["to"] == "live server"


def test_another_file(measured: tuple[Specimen, Path, Measurement], tmp_path: Path) -> None:
    """The base is served instead of the tuned model."""
    specimen, file, found = measured
    other = rewrite(file, tmp_path / "other.gguf", merged_tensors(specimen.base, None))
    live = _live(other, found, tmp_path / "log.txt")
    assert "are not the file's" in live.problems[0]
    certificate = _judged(found, live)
    assert (certificate.ok, certificate.broken_stage) == (False, "deploy")


def test_another_type_of_the_same_weights(
    measured: tuple[Specimen, Path, Measurement], tmp_path: Path
) -> None:
    """Its answers are within what another build may move; its size is not the file's."""
    _, file, found = measured
    other = tmp_path / "q8_0.gguf"
    quantize(str(file), str(other), "q8_0", threads=1)
    live = _live(other, found, tmp_path / "log.txt", of=file)
    assert live.problems == (
        f"the server holds a model of {read_gguf(other).weight_bytes:,} bytes, the file's weights take "
        f"{read_gguf(file).weight_bytes:,}",
    )
    assert _judged(found, live).broken_stage == "deploy"


def test_a_context_too_short(measured: tuple[Specimen, Path, Measurement], tmp_path: Path) -> None:
    """Silent wrong 14."""
    _, file, found = measured
    live = _live(file, found, tmp_path / "log.txt", context=256)
    assert live.problems == (
        "the server's context is 256 tokens, 512 were asked for",
        "the server's context of 256 tokens is too short: rows have up to 300; raise deploy.context_tokens",
    )
    failure = live.failure()
    assert failure and failure.code == 5


def test_sampling_that_nobody_set(measured: tuple[Specimen, Path, Measurement], tmp_path: Path) -> None:
    """Silent wrong 15: a file that brings a temperature of 1.5 which the measured one has not."""
    _, file, found = measured
    hot = rewrite(file, tmp_path / "hot.gguf", general__sampling__temp=1.5)
    live = _live(hot, found, tmp_path / "log.txt")
    assert live.problems == ("the server samples with temperature 1.5, which nobody set (expected 0.8)",)
    assert _judged(found, live).broken_stage == "deploy"

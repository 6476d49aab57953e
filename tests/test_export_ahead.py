"""What is quantized while the model is laid out: the same bytes, where they are wanted, not too many."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from forge import report
from forge.errors import DataError
from forge.export import ahead
from forge.export.ahead import Ahead, quantizing_ahead
from forge.export.kernels import CHOICE, quantize_rows
from forge.export.tensors import LazyTensor
from forge.model.gguf_header import NUMBERS, TYPES
from tests.models import make_adapter, make_model
from tests.test_export import export
from tests.told_sink import Told

WIDTH = 256


def matrix(name: str, rows: int = 512, dtype: str = "F32") -> LazyTensor:
    """Always the same values of a name."""
    values = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(len(name)))
    values = values.to(torch.bfloat16 if dtype == "BF16" else torch.float32)
    return LazyTensor(name, dtype, (rows, WIDTH), lambda start, stop: values[start:stop])


def made(tensors: Sequence[LazyTensor], quant: str = "q4_k_m") -> Ahead:
    """All that there is to make."""
    with ahead._ahead(tensors, Path("none"), {"quant": quant, "threads": 2}) as found:
        for thread in threading.enumerate():
            if thread.name == "ahead":
                thread.join()
    return found


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_slab_has_the_bytes_of_any_other(dtype: str) -> None:
    tensor = matrix("a", rows=5000, dtype=dtype)  # two slabs
    found = made([tensor])
    for start, stop in ((0, 4096), (4096, 5000)):
        expected = quantize_rows("a", "Q4_K", tensor.read(start, stop).float().numpy(), {})
        assert (found.take(tensor, start, stop, "F32", "Q4_K") == expected).all()


def test_it_is_given_for_what_it_is_alone() -> None:
    """Of this type, of these rows, not rounded to another type before, and once."""
    tensor = matrix("a")
    found = made([tensor])
    assert found.take(tensor, 0, 512, "F32", "Q6_K") is None
    assert found.take(tensor, 0, 512, "F16", "Q4_K") is None
    assert found.take(tensor, 0, 256, "F32", "Q4_K") is None
    assert found.take(matrix("b"), 0, 512, "F32", "Q4_K") is None
    assert found.take(tensor, 0, 512, "F32", "Q4_K") is not None
    assert found.take(tensor, 0, 512, "F32", "Q4_K") is None


@pytest.mark.parametrize(
    ("quant", "kind"),
    [("q4_k_m", "Q4_K"), ("q3_k_s", "Q3_K"), ("q2_k", "Q2_K"), ("q8_0", "Q8_0"), ("iq4_xs", "IQ4_XS")],
)
def test_the_mixture_tells_the_type(quant: str, kind: str) -> None:
    tensor = matrix("a")
    slab = made([tensor], quant).take(tensor, 0, 512, "F32", kind)
    _, block, size = TYPES[NUMBERS[kind]]
    assert slab.nbytes == 512 * WIDTH // block * size


@pytest.mark.parametrize("quant", ["f16", "bf16", "f32", "iq2_xxs", "nonsense"])
def test_nothing_is_made_where_it_is_of_no_use(quant: str) -> None:
    """Nothing to quantize, or not without an importance matrix."""
    tensor = matrix("a")
    found = made([tensor], quant)
    assert found.take(tensor, 0, 512, "F32", found.kind) is None


def test_layers_come_first_and_there_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_BYTES", 2 * 512 * WIDTH // 256 * 144)
    head, layers = matrix("head", rows=9000), [matrix(name) for name in ("a", "bb", "ccc", "dddd")]
    row = LazyTensor("norm", "F32", (WIDTH,), lambda start, stop: torch.ones(1, WIDTH))
    narrow = LazyTensor("narrow", "F32", (9, 32), lambda start, stop: torch.ones(9, 32))
    found = made([head, row, narrow, *layers])
    assert found.take(head, 0, 4096, "F32", "Q4_K") is None
    told = [found.take(tensor, 0, 512, "F32", "Q4_K") is not None for tensor in layers]
    assert told == [True, True, False, False]


def test_what_cannot_be_read_is_no_error_yet() -> None:
    def broken(start: int, stop: int) -> Any:
        raise DataError("broken")

    found = made([LazyTensor("a", "F32", (512, WIDTH), broken)])
    assert found.take(matrix("a"), 0, 512, "F32", "Q4_K") is None


def test_it_ends_with_the_block() -> None:
    """Also when that fails: nothing goes on to read a model that is refused."""
    reads: list[int] = []
    started = threading.Event()

    def endless(start: int, stop: int) -> Any:
        reads.append(start)
        started.set()
        return torch.ones(stop - start, WIDTH)

    # All of them together are less than may be held.
    many = [LazyTensor(str(number), "F32", (1, WIDTH), endless) for number in range(200_000)]
    with pytest.raises(DataError), quantizing_ahead(many, "Q4_K"):
        started.wait(60)
        raise DataError("refused")
    assert "ahead" not in {thread.name for thread in threading.enumerate()}
    assert 0 < len(reads) < 200_000


@pytest.mark.training
@pytest.mark.programs
@pytest.mark.timeout(1500)
def test_the_file_is_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs that were made ahead are in it, where there are two threads and ggml's own kernels."""
    monkeypatch.setenv(CHOICE, "ggml")
    base = make_model(tmp_path / "base", "llama", "home-made", num_hidden_layers=3)
    adapter = make_adapter(base, tmp_path / "adapter")
    files, used = [], []
    for threads in (1, 2):
        told = Told()
        report.configure(sink=told, verbose=True)
        export(base, adapter, tmp_path / str(threads), threads=threads)
        files.append((tmp_path / str(threads) / "model.gguf").read_bytes())
        [said] = [text for _, text in told.texts if "quantized while" in text]
        used.append(int(said.split()[0]))
    assert files[0] == files[1]
    assert used[0] == 0 < used[1]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({}, "Q4_K"), ({"threads": 1}, ""), ({"importance": "a.gguf"}, ""), ({"merge_base": "nf4"}, "")],
)
def test_when_nothing_is_made_ahead(settings: dict[str, Any], kind: str) -> None:
    """Not without a core for it, nor of what is rounded by importance, nor through NF4."""
    whole = {"quant": "q4_k_m", "threads": 2} | settings
    with ahead._ahead([matrix("a")], Path("none"), whole) as found:
        assert found.kind == kind


def test_nothing_is_made_with_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are quick: beside the imports more time is lost than saved."""
    tensor = matrix("a")

    def compiled(tools: Path, kinds: Sequence[str], *, tell: bool) -> dict[str, None]:
        return {kind: None for kind in kinds if kind == "Q4_K"}

    monkeypatch.setattr(ahead, "choose_kernels", compiled)
    assert made([tensor]).take(tensor, 0, 512, "F32", "Q4_K") is None
    assert made([tensor], "q8_0").take(tensor, 0, 512, "F32", "Q8_0") is not None


def test_a_type_that_cannot_be_read_is_left_alone() -> None:
    """What the converter does not leave as it is can never be taken, so no time is lost on it."""
    read: list[str] = []

    def watched(start: int, stop: int) -> Any:
        read.append("F8_E4M3")
        return torch.ones(stop - start, WIDTH)

    made([LazyTensor("a", "F8_E4M3", (512, WIDTH), watched), matrix("b")])
    assert not read

"""What a type costs and saves on one model, from the shapes of its file."""

from __future__ import annotations

from pathlib import Path

from forge.export.cost import bytes_as, cost_of
from forge.model.gguf_header import GgufHeader, GgufTensor


def header(path: Path, width: int, kind: str, taken: int) -> GgufHeader:
    """Hundred rows of `width` values in a file of `taken` bytes, and a norm."""
    with path.open("wb") as stream:
        stream.truncate(taken)
    tensors = {
        "blk.0.ffn_up.weight": GgufTensor("blk.0.ffn_up.weight", kind, (100_000, width), 1000, taken),
        "blk.0.ffn_norm.weight": GgufTensor("blk.0.ffn_norm.weight", "F32", (width,), 2000, 3000),
    }
    return GgufHeader(path, 3, 32, {}, tensors)


def test_sizes_from_shapes(tmp_path: Path) -> None:
    wide = header(tmp_path / "m.gguf", 512, "Q4_K", 28_900_000)
    assert bytes_as(wide, "Q8_0") == 1000 + 100_000 * 512 // 32 * 34 + 4 * 512
    assert bytes_as(header(tmp_path / "n.gguf", 100, "F16", 1), "Q8_0") == 1000 + 2 * 100_000 * 100 + 400


def test_the_words(tmp_path: Path) -> None:
    """N5: a type that hardly pays on this model is called so; one that pays shows what it saves."""
    path = tmp_path / "m.gguf"
    pays = cost_of(header(path, 512, "Q4_K", 28_900_000), "q4_k_m")
    assert pays == "q4_k_m: 28.9 MB, 28% of f16's 102.4 MB; q8_0 would be 25.5 MB larger"
    hardly = cost_of(header(path, 512, "Q5_0", 45_000_000), "q4_k_m")
    assert hardly.endswith("q8_0 would be 9.4 MB larger: on this model q4_k_m saves little")
    never = cost_of(header(path, 512, "Q8_0", 54_500_000), "q6_k")
    assert never.endswith("q8_0 would be no larger, and loses less")
    assert cost_of(header(path, 512, "F16", 102_400_000), "f16") == "f16: 102.4 MB; q8_0 would be 54.4 MB"

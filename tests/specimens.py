"""Real files to verify, sound and broken: tiny random-weight models, their adapters, their GGUFs.

A sound file is llama.cpp's own conversion. A broken one is that file with the tensors or metadata
that a certain mistake would have left in it, written by gguf: peft merges (into another base, at
another scale, of another adapter), and Llama's converter's order of rows is applied here.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.codec import from_plain
from forge.model.tokenizer_files import read_tokenizer
from forge.resolve.rows import builtin_rows
from forge.verify.measure import measure
from forge.verify.measurement import Gates, Measurement, VerifyRequest
from forge.verify.verdict import judge
from forge.verify.yardstick import export_f16
from tests.exporting import ingredients
from tests.models import change_json, load, make_adapter, make_model
from tests.test_data_tokens import format_of
from tests.vocabularies import converters

_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_ROWS = 16
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Specimen:
    """A base, its adapter, and rows in the base's template."""

    base: Path
    adapter: Path | None
    rows: Path
    scratch: Path

    def verify(self, gguf: Path, **changes: Any) -> Mapping[str, Any]:
        """The certificate of `gguf`; `changes` replace arguments or settings of the measurement."""
        gates = changes.pop("gates", Gates())
        return judge(self.measure(gguf, **changes), gates).plain()

    def measure(self, gguf: Path, **changes: Any) -> Measurement:
        """What is measured of `gguf`; `changes` are fields of the request, paths as text."""
        end = format_of(self.base).end_of_turn_id
        asked = {"gguf": gguf, "rows": self.rows, "scratch": self.scratch, "end_of_turn_id": end}
        return measure(from_plain(VerifyRequest, {**source_of(self), **asked, **changes}))

    def f16(self, directory: Path, **changes: Any) -> Path:
        """llama.cpp's own f16 of base and adapter, in the new `directory`."""
        directory.mkdir()
        end = {"end_of_turn_id": format_of(self.base).end_of_turn_id}
        return export_f16(ingredients({}, **{**source_of(self), **end, **changes}), directory)


def source_of(specimen: Specimen) -> dict[str, Any]:
    """What a conversion is made from."""
    return {
        "base": str(specimen.base),
        "adapter": str(specimen.adapter) if specimen.adapter else None,
        "tokenizer": str(specimen.base),
        "chat_template": read_tokenizer(specimen.base).chat_template,
        "converters": str(converters()),
    }


# The converters of these families read a SentencePiece model, and nothing else.
_VOCABULARIES = {"phi3": "phi-3", "gemma2": "gemma-spm", "gemma3_text": "gemma-spm"}


def make_specimen(root: Path, architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Specimen:
    """A base of `architecture`, and a LoRA of all its linear layers; of attention's alone beside experts.

    Its vocabulary is the home-made one where the family's converter reads that.
    """
    root.mkdir(exist_ok=True)
    vocabulary = _VOCABULARIES.get(architecture, "home-made")
    base = make_model(root / "base", architecture, vocabulary, seed=seed, **changes)
    # Experts are adapted fused by peft, which the adapter's reader refuses.
    targets = ["q_proj", "v_proj"] if architecture in ("mixtral", "qwen3_moe") else "all-linear"
    adapter = make_adapter(base, root / "adapter", seed=seed + 1, target_modules=targets)
    return Specimen(base, adapter, write_rows(base, root), root)


def write_rows(base: Path, directory: Path) -> Path:
    """A few of the built-in rows: a fault shows in any."""
    rows = builtin_rows(format_of(base), 512, directory)
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    rows.write_text("".join(lines[:_ROWS]), encoding="utf-8")
    return rows


def scaled(adapter: Path, directory: Path, times: float) -> Path:
    """A copy of an adapter whose scale is `times` as large."""
    import json

    shutil.copytree(adapter, directory)
    alpha = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]
    change_json(directory / "adapter_config.json", lora_alpha=alpha * times)
    return directory


def merged_tensors(
    base: Path, adapter: Path | None, *, key_heads: int = 2, rows: int | None = None
) -> dict[str, Any]:
    """The tensors of a Llama's GGUF in float16: peft merges, the converter's order of rows.

    `key_heads` other than the model's two is the mistake of converting it without grouped heads; `rows` are
    those of the embedding where it was resized.
    """
    import numpy as np

    model = load(base, adapter, rows=rows)
    found = {}
    for name, tensor in model.state_dict().items():
        target = _gguf_name(name.removesuffix(".weight"))
        values = tensor.float().numpy()
        if target.endswith(("attn_q", "attn_k")):
            heads = 4 if target.endswith("attn_q") else key_heads
            shape = (heads, 2, values.shape[0] // heads // 2, values.shape[1])
            values = values.reshape(shape).swapaxes(1, 2).reshape(values.shape)
        found[f"{target}.weight"] = values if values.ndim == 1 else values.astype(np.float16)
    return found


def _gguf_name(module: str) -> str:
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    number, _, rest = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{_LAYER[rest]}"


def rewrite(source: Path, target: Path, tensors: Mapping[str, Any] | None = None, **metadata: Any) -> Path:
    """Copy a GGUF with other tensors or metadata (`__` stands for a dot); None leaves one out.

    A tensor is an array, or one of a GGUFReader, whose type it has.
    """
    import gguf

    reader = gguf.GGUFReader(str(source))
    changed = {name.replace("__", "."): value for name, value in metadata.items()}
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(target), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        value = changed.pop(name, field.contents())
        if value is not None:
            writer.add_key_value(name, value, kind, inner)
    for name, value in changed.items():
        kind = gguf.GGUFValueType.BOOL if isinstance(value, bool) else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(name, value, gguf.GGUFValueType.UINT32 if name.endswith("_id") else kind)
    for tensor in reader.tensors:
        values = (tensors or {}).get(tensor.name, tensor.data)
        if isinstance(values, gguf.ReaderTensor):
            writer.add_tensor(tensor.name, values.data, raw_dtype=values.tensor_type)
        elif values is not None:
            raw = tensor.tensor_type if values.dtype == tensor.data.dtype else None
            writer.add_tensor(tensor.name, values, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target

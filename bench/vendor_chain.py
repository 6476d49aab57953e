"""Base and adapter to a quantized GGUF as a person does it, without forge, in three steps and programs.

`python vendor_chain.py TREE BASE ADAPTER OUT QUANT`: peft's merge_and_unload and save, llama.cpp's
convert_hf_to_gguf.py (`TREE` holds it), llama_model_quantize, as llama-quantize calls it. The yardstick of
`bench/export.py` and of the tests of equal bytes. Prints one JSON line: seconds of each step, bytes written.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

STEPS = ("merge", "convert", "quantize")


def main(tree: Path, base: Path, adapter: Path, out: Path, quant: str) -> None:
    """Run the steps, each in a process of its own, beside `out`."""
    merged, plain = out.with_name("merged"), out.with_name("plain.gguf")
    commands = (
        [sys.executable, __file__, "merge", str(base), str(adapter), str(merged)],
        convert_command(tree, merged, plain, "f16", out.stem),
        [sys.executable, __file__, "quantize", str(plain), str(out), quant],
    )
    seconds = {}
    for step, command in zip(STEPS, commands, strict=True):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=sys.stderr)
        seconds[step] = round(time.perf_counter() - start, 2)
    written = [*merged.glob("*.safetensors"), plain, out]
    print(json.dumps({"seconds": seconds, "bytes_written": sum(path.stat().st_size for path in written)}))
    shutil.rmtree(merged)
    plain.unlink()


def merge(base: str, adapter: str, merged: str) -> None:
    """peft's merge in bfloat16, saved with the tokenizer's files."""
    import peft
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)
    for path in Path(base).iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copyfile(path, Path(merged) / path.name)


def convert_command(tree: Path, merged: Path, plain: Path, outtype: str, name: str) -> list[str]:
    """The command line that converts the checkpoint `merged`."""
    command = [sys.executable, str(tree / "convert_hf_to_gguf.py"), str(merged), "--outfile", str(plain)]
    return [*command, "--outtype", outtype, "--model-name", name]


def quantize(plain: str, out: str, quant: str, threads: int | None = None) -> None:
    """What the llama-quantize program does; raises RuntimeError when llama.cpp refuses."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quant.upper()}")
    parameters.nthread = threads or os.cpu_count() or 1
    if llama_cpp.llama_model_quantize(plain.encode(), out.encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp did not quantize {plain} to {quant}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["merge", base, adapter, merged]:
            merge(base, adapter, merged)
        case ["quantize", plain, out, quant]:
            quantize(plain, out, quant)
        case [tree, base, adapter, out, quant]:
            main(Path(tree), Path(base), Path(adapter), Path(out), quant)

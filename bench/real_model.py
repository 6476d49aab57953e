"""SmolLM2-135M-Instruct as `builtin:smollm2` is: `python -m bench.real_model DIR`, a program of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from forge.model.smollm2 import MakeRequest, make_smollm2, packaged_gguf

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    make_smollm2(MakeRequest(packaged_gguf(), directory))

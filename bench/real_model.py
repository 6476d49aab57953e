"""SmolLM2-135M-Instruct as the tests make it: `python -m bench.real_model DIR`, a program of its own."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.real.smollm2 import make

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True)
    make(directory, "bfloat16")

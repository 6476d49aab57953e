"""Saving an adapter so that it says what it needs and nothing of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forge.adapter.tokenizer import copy_tokenizer
from forge.errors import StageError


def save_adapter(
    model: Any,
    tokenizer: Path,
    out: Path,
    *,
    base_name: str,
    base_revision: str | None,
    initial: Path | None = None,
    weights: Any = None,
) -> None:
    """Write the adapter and the files of the directory `tokenizer` into `out`.

    `initial` holds the factors before training where they took a part of the base with them (PiSSA,
    OLoRA): peft subtracts them, so that the adapter, of twice the rank, fits the base as it is. `weights`
    are the model's where it does not hold them whole itself.
    """
    options = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
    if weights is not None:
        options["state_dict"] = weights
    model.save_pretrained(str(out), **options)
    written = out / "adapter_model.safetensors"
    if not written.exists():
        raise StageError("peft saved no adapter_model.safetensors")
    written.chmod(0o644)  # safetensors writes 0600, which a container's user cannot read
    # peft's model card holds this machine's paths and versions; forge writes its own elsewhere.
    (out / "README.md").unlink(missing_ok=True)
    configuration = json.loads((out / "adapter_config.json").read_text())
    configuration["base_model_name_or_path"] = base_name
    configuration["revision"] = base_revision
    for key in ("target_modules", "modules_to_save"):
        # Sets: their order would differ from run to run.
        if isinstance(configuration.get(key), list):
            configuration[key] = sorted(configuration[key])
    (out / "adapter_config.json").write_text(json.dumps(configuration, indent=2, sort_keys=True) + "\n")
    copy_tokenizer(tokenizer, out)

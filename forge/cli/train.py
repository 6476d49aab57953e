from __future__ import annotations

from forge.cli.stage_of import stage_command

command = stage_command("train", "Run RECIPE up to its adapter.")

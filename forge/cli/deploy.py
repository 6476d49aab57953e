from __future__ import annotations

from forge.cli.stage_of import stage_command

command = stage_command(
    "deploy", "Run RECIPE up to a served model whose prompts and ids are compared with training's."
)

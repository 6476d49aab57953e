from __future__ import annotations

from forge.cli.stage_of import stage_command

command = stage_command("evaluate", "Run RECIPE up to the held-out figures of base and tuned model.")

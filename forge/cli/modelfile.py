from __future__ import annotations

from forge.cli.stage_of import stage_command

command = stage_command("modelfile", "Run RECIPE up to its Modelfiles.")

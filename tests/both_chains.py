"""Many small exports in one process: the usual way's, or forge's, from a file of jobs.

`python -m tests.both_chains vendor|forge TREE JOBS.json`. Imports of torch and transformers are most of
what a small export costs, so all of one kind share a process. A job is {name, directory, outtype, quant,
out}; with {adapter, merged} forge's merges and keeps the merged checkpoint there, and with {end_of_turn_id}
it is no plain export but the default one. The usual way is the converter's own script, then
llama_model_quantize unless `quant` is `outtype`.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from bench.vendor_chain import convert_command, quantize


def vendor(tree: Path, job: dict[str, Any]) -> None:
    out = Path(job["out"])
    whole = job["quant"] == job["outtype"]
    plain = out if whole else out.with_suffix(".plain")
    _, script, *arguments = convert_command(tree, Path(job["directory"]), plain, job["outtype"], job["name"])
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    if not whole:
        quantize(str(plain), str(out), job["quant"], threads=1)
        plain.unlink()


def forge(tree: Path, job: dict[str, Any]) -> None:
    from tests.exporting import export_here

    out = Path(job["out"])
    scratch = out.with_suffix(".scratch")
    scratch.mkdir()
    settings = {"name": job["name"], "quant": job["quant"], "threads": 2}
    settings |= {"plain": "end_of_turn_id" not in job, "end_of_turn_id": job.get("end_of_turn_id")}
    settings["keep_merged"] = "merged" in job
    template = Path(job["directory"], "chat_template.jinja").read_text(encoding="utf-8")
    directory = job["directory"]
    export_here(
        base=directory, adapter=job.get("adapter"), tokenizer=directory, chat_template=template,
        out=str(scratch), converters=str(tree), settings=settings,
    )  # fmt: skip
    (scratch / "model.gguf").rename(out)
    if "merged" in job:
        (scratch / "merged").rename(job["merged"])


if __name__ == "__main__":
    chain, tree, jobs = sys.argv[1:]
    if chain == "vendor":
        sys.path[:0] = [tree, f"{tree}/gguf-py"]
    for one in json.loads(Path(jobs).read_text(encoding="utf-8")):
        (vendor if chain == "vendor" else forge)(Path(tree), one)

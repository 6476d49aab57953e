"""What a name stands for: a run, by path or by name from anywhere, and the model in it."""

from __future__ import annotations

from pathlib import Path

from forge import report
from forge.errors import DataError
from forge.runs.files import ADAPTER_SUFFIX, MANIFEST, RUNS, adapter_beside, run_gguf
from forge.runs.manifest import read_manifest
from forge.store import runs
from forge.store.artifacts import open_store


def find_run(name: str) -> Path:
    """The directory of a run, by path or by name from anywhere; raises `DataError`."""
    for candidate in (Path(name), Path(RUNS) / name):
        if (candidate / MANIFEST).is_file():
            return candidate.absolute()
    known = runs.runs(open_store(read_only=True))
    places = [run.directory for run in known if run.name == name and (run.directory / MANIFEST).is_file()]
    if len(places) == 1:
        return places[0]
    if places:
        raise DataError(
            f"there are {len(places)} runs called {name}",
            hint="name its directory: " + ", ".join(map(str, places)),
        )
    names = ", ".join(sorted({run.name for run in known})) or "none yet"
    raise DataError(f"there is no run {name}", hint=f"runs are: {names}")


def find_model(name: str) -> tuple[Path, Path | None]:
    """The GGUF that a run or a path stands for, and a run's own adapter to serve with it.

    Of a run with several types it is the one that its recipe names first. A path is only that file. Raises
    `DataError`, also for a run whose adapter is gone: the base that is left is not what was trained.
    """
    path = Path(name)
    if path.suffix == ".gguf" or path.is_file():
        if adapter_beside(path).is_file():
            report.warning(f"{path.name} is taken by itself, without {adapter_beside(path).name} beside it")
        return path.absolute(), None
    directory = find_run(name)
    manifest = read_manifest(directory)
    exported = manifest.read_facts().export
    served = directory / run_gguf(manifest.name, exported.quant or "")
    files = [served] if served.is_file() else sorted(directory.glob("*.gguf"))
    model = next((file for file in files if not file.name.endswith(ADAPTER_SUFFIX)), None)
    if model is None:
        raise DataError(
            f"{directory} has no GGUF: its ship did not get that far", hint="forge ship its recipe"
        )
    adapter = adapter_beside(model)
    if adapter.is_file():
        return model, adapter
    if exported.mode == "adapter":
        raise DataError(
            f"{adapter} is gone, and {model.name} without it is the base",
            hint="forge ship its recipe again; or name the file, for only the base",
        )
    return model, None

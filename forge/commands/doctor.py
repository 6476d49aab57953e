"""`forge doctor`: what this machine lacks and what that costs; or what a message means and what to do.

Not covered: what only a training run shows.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx
import psutil

from forge import process, report, worker
from forge.diagnosis import Match, diagnose, log_lines
from forge.errors import DataError, ForgeError, MissingToolError
from forge.export.compiled import library_file
from forge.model.estimate import available, usable_cores
from forge.model.hub_repository import endpoint, is_offline
from forge.recipe.words import TRACKERS
from forge.store.artifacts import open_store
from forge.tools import xllamacpp
from forge.tools.containers import engine
from forge.tools.foreign import foreign_forge
from forge.tools.llama_cpp import find_converters
from forge.tools.ollama import Ollama, server_url
from forge.train.machine import LookRequest, look

_LITTLE_DISK = 20e9
_PATIENCE = 3.0
"""Seconds that a hub has to answer."""


@dataclass(frozen=True)
class Check:
    """One look at the machine. `needed`: without it no ship of a recipe with default settings works."""

    name: str
    ok: bool
    detail: str
    hint: str = ""
    needed: bool = False


def doctor() -> Mapping[str, object]:
    """Look at the machine and show each check; takes some seconds, since torch is imported once.

    Raises `MissingToolError` when something that every ship needs is not there.
    """
    checks: list[Check] = []
    for check in (*_python(), *_hardware(), *_training(), *_llama_cpp(), *_servers(), *_surroundings()):
        checks.append(check)
        _show(check)
    fields = {"checks": [asdict(check) for check in checks]}
    if missing := [check for check in checks if check.needed and not check.ok]:
        failure = MissingToolError(
            f"a ship needs what is missing here: {', '.join(check.name for check in missing)}",
            hint=missing[0].hint,
        )
        failure.fields = fields
        raise failure
    return fields


def _show(check: Check) -> None:
    report.info(f"{'ok     ' if check.ok else 'missing'}  {check.name}: {check.detail}")
    if not check.ok and check.hint:
        report.info(f"         {check.hint}")


def _python() -> Iterator[Check]:
    known = sys.version_info >= (3, 11)
    yield Check("Python", known, platform.python_version(), "forge needs 3.11 or later", needed=True)
    if other := foreign_forge():
        ours = Path(sys.executable).with_name("forge")
        yield Check("command", False, f"the forge on your PATH is another program: {other}", f"use {ours}")


def _hardware() -> Iterator[Check]:
    memory, cores = available(), usable_cores()
    flags = xllamacpp.missing_flags()
    yield Check(
        "processor",
        not flags,
        f"{platform.machine()}, {cores} of {os.cpu_count()} cores usable, load {os.getloadavg()[0]:.1f}"
        + (f", lacks {', '.join(flags)}" if flags else ""),
        "the embedded server cannot run: use deploy.runtime: llama-server with one compiled for this machine",
    )
    yield Check("memory", True, f"{memory.free / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")
    root = open_store(read_only=True).root
    place = next(path for path in (root, *root.parents) if path.exists())
    free = psutil.disk_usage(str(place)).free
    yield Check(
        "disk",
        free > _LITTLE_DISK,
        f"{free / 1e9:.1f} GB free in {place}",
        "a 7B model takes some 20 GB on its way: forge gc shows what can go; FORGE_HOME moves the store",
    )


def _training() -> Iterator[Check]:
    names = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    install = "pip install 'forge-ship[train]'"
    if lacking:
        yield Check("training stack", False, f"not installed: {', '.join(lacking)}", install, needed=True)
        return
    versions = ", ".join(f"{name} {version(name)}" for name in names[1:])
    yield Check("training stack", True, versions, needed=True)
    try:
        machine = worker.perform(look, LookRequest())
    except ForgeError as failure:
        yield Check("torch", False, failure.message, failure.hint or install, needed=True)
        return
    yield Check("torch", True, f"{machine.torch}, {machine.threads} threads", needed=True)
    gpu = machine.gpu
    yield Check(
        "GPU",
        gpu is not None,
        f"{gpu.name}, capability {gpu.capability}, {gpu.bytes_free / 1e9:.1f} of "
        f"{gpu.bytes_total / 1e9:.1f} GB free"
        if gpu
        else f"none that torch sees ({_driver(machine.cuda)}); training runs on {machine.device} "
        f"in {machine.compute}",
        "a base of a billion parameters or more takes hours without one; see https://pytorch.org/get-started",
    )
    if gpu:
        yield Check(
            "bfloat16", gpu.has_bfloat16, f"training computes in {machine.compute}", "float16 overflows"
        )
        yield Check(
            "FlashAttention",
            machine.has_flash_attention,
            "installed" if machine.has_flash_attention else "not installed; sdpa is used",
            "pip install flash-attn --no-build-isolation: faster from about 1,000 tokens a row",
        )
    four_bit = machine.four_bit
    yield Check(
        "bitsandbytes",
        four_bit.computes_in is not None,
        f"{four_bit.bitsandbytes}, 4-bit layers compute in {four_bit.computes_in}"
        if four_bit.computes_in
        else four_bit.why_not,
        "QLoRA does not work here: pip install -U bitsandbytes, or train.method: lora",
    )


def _driver(cuda: str | None) -> str:
    """What the driver says of itself, and of the CUDA that it has for torch's."""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA driver"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = process.run(query).output.strip().partition("\n")[0] or "nvidia-smi shows none"
    version = re.search(r"CUDA Version: (\d+\.\d+)", process.run(["nvidia-smi"]).output)
    return f"{gpu}; CUDA {version[1] if version else 'unknown'} in the driver, {cuda or 'none'} in torch"


def _llama_cpp() -> Iterator[Check]:
    try:
        yield Check("llama.cpp", True, f"llama-cpp-python {version('llama-cpp-python')}", needed=True)
    except PackageNotFoundError:
        hint = "pip install 'forge-ship[train]' (compiles for some minutes)"
        yield Check("llama.cpp", False, "llama-cpp-python is not installed", hint, needed=True)
    root = open_store(read_only=True).root
    try:
        yield Check("converters", True, str(find_converters(root)), needed=True)
    except MissingToolError as failure:
        yield Check("converters", False, failure.message, failure.hint, needed=True)
    compiled = library_file(root / "tools").is_file()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    yield Check(
        "kernels",
        compiled,
        "compiled: Q4_K and Q6_K are quantized several times as fast" if compiled else "not compiled",
        "forge setup compiles them" if compiler else "install a C++ compiler (g++), then: forge setup",
    )


def _servers() -> Iterator[Check]:
    try:
        xllamacpp.check_processor()
        yield Check("embedded server", True, f"xllamacpp {version('xllamacpp')}")
    except MissingToolError as failure:
        yield Check("embedded server", False, failure.message, failure.hint)
    url = server_url()
    try:
        with Ollama(url) as server:
            yield Check("Ollama", True, f"{'.'.join(map(str, server.version()))} at {url}")
    except ForgeError as failure:
        yield Check("Ollama", False, failure.message, f"only for deploy.runtime: ollama. {failure.hint}")
    try:
        with engine():
            yield Check("containers", True, "docker or podman answers")
    except ForgeError as failure:
        yield Check("containers", False, failure.message, f"only for the container runtime. {failure.hint}")


def _surroundings() -> Iterator[Check]:
    from huggingface_hub import get_token

    yield Check(
        "hub login",
        get_token() is not None,
        "a token is here" if get_token() else "none",
        "only for gated or private models: hf auth login",
    )
    yield _hub()
    trackers = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    yield Check(
        "trackers",
        bool(trackers),
        ", ".join(trackers) or "none installed",
        "only for train.report_to: pip install tensorboard",
    )


def _hub() -> Check:
    if is_offline():
        return Check("hub", True, "not asked (offline)")
    try:
        status = httpx.head(endpoint(), timeout=_PATIENCE).status_code
        if status == httpx.codes.PROXY_AUTHENTICATION_REQUIRED or status >= 500:
            raise OSError(f"status {status}")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, ImportError) as failure:
        hint = "only for bases and data by a hub's name: check network and proxy, or HF_ENDPOINT of a mirror"
        return Check("hub", False, f"{endpoint()} does not answer: {str(failure) or 'no answer'}", hint)
    return Check("hub", True, f"{endpoint()} answers")


def explain(message: str) -> Mapping[str, object]:
    """Cause and remedy of a message, or of every message in a log file.

    Raises `DataError` when nothing in it is known.
    """
    path = Path(message)
    try:
        is_file = len(message) < 4096 and "\n" not in message and path.is_file()
    except (OSError, ValueError):
        is_file = False
    matches = diagnose(log_lines(path) if is_file else message.splitlines())
    if not matches:
        failure = DataError(
            f"nothing in {path} is known here" if is_file else "this message is not known here",
            hint="look at the first error above it, and at the last line of the traceback; a ship's whole "
            "output is in runs/<name>/log.txt",
        )
        failure.fields = {"matches": []}
        raise failure
    for match in matches:
        _tell(match, is_file=is_file)
    return {"matches": [asdict(match) for match in matches]}


def _tell(match: Match, *, is_file: bool) -> None:
    if is_file:
        times = f" ({match.count} times)" if match.count > 1 else ""
        report.info(f"line {match.line}{times}: {match.message}")
    report.info(f"  cause:  {match.cause} ({match.source})")
    report.info(f"  remedy: {match.remedy}")

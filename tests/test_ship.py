"""One real ship of a small recipe, and all that can be seen of it. The other ships are in test_ship_*.py."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from forge import process
from forge.cli.main import run_command
from forge.model.gguf_header import read_gguf
from forge.serve.client import Client, find
from forge.store import runs
from forge.store.artifacts import open_store
from tests.conftest import link_converters, tree
from tests.shipping import PURE, RECIPE, STAGES, Answer, Workshop, processes_of, wait_for

pytestmark = [pytest.mark.training, pytest.mark.network, pytest.mark.programs]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workshop, Answer]]:
    """The workshop after its first ship, and what that said. Tests leave its run as it is."""
    root = tmp_path_factory.mktemp("ship")
    home = link_converters(root / "home")
    (root / "first").mkdir()
    workshop = Workshop(root / "first", home)
    workshop.recipe()
    answer = workshop.ship()
    yield workshop, answer
    assert processes_of(home) == [], "something of the ships is still running"


@pytest.fixture
def again(shipped: tuple[Workshop, Answer], request: pytest.FixtureRequest) -> Workshop:
    """A new directory with the same store and recipe."""
    workshop = shipped[0].beside(request.node.name.replace("[", "-").replace("]", "")[:80])
    workshop.recipe()
    return workshop


@pytest.fixture
def here(again: Workshop, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """`again`, for commands inside this process."""
    monkeypatch.chdir(again.directory)
    monkeypatch.setenv("FORGE_HOME", str(again.home))
    return again


def test_the_json_has_the_fields_of_the_contract(shipped: tuple[Workshop, Answer]) -> None:
    workshop, answer = shipped
    directory = workshop.run
    fields = dict(answer.fields)
    stages, learned, smoke = (fields.pop(name) for name in ("stages", "learned", "smoke"))
    certificate, [shipped_type] = fields.pop("certificate"), fields.pop("types")
    assert (shipped_type["quant"], shipped_type["gguf"], shipped_type["ok"]) == (
        "q4_k_m", "mini-q4_k_m.gguf", True,
    )  # fmt: skip
    assert fields == {
        "run": str(directory),
        "adapter": str(directory / "adapter"),
        "gguf": str(directory / "mini-q4_k_m.gguf"),
        "modelfile": str(directory / "Modelfile"),
        "modelfile_reason": None,
        "certificate_reason": None,
        "endpoint": None,
    }
    assert certificate["ok"] is True and certificate["broken_stage"] is None
    assert [one["to"] for one in certificate["handovers"]] == [
        "fp32 base + adapter", "weights in F16", "GGUF f16", "GGUF q4_k_m", "live server",
    ]  # fmt: skip
    assert certificate["sample"]["positions"] > 0 and certificate["live"]["problems"] == []
    assert [stage["name"] for stage in stages] == list(STAGES)
    assert not any(stage["cached"] for stage in stages)
    assert all(stage["seconds"] >= 0 for stage in stages)
    assert learned.keys() == {"metric", "before", "after", "rows", "served"}
    assert learned["metric"] == "exact_match" and learned["rows"] == 4 and learned["served"]
    assert [one.keys() for one in smoke] == [{"prompt", "answer", "ok"}]
    assert smoke[0]["ok"] is True and smoke[0]["answer"]


def test_the_run_has_the_files_of_the_contract(shipped: tuple[Workshop, Answer]) -> None:
    """J1 and C of the contract: what a person looks for, readable to all, text files writable."""
    workshop, _ = shipped
    found = {name: content for name, content in tree(workshop.directory / "runs").items() if content}
    assert found.keys() == {
        "mini/adapter/adapter_config.json",
        "mini/adapter/adapter_model.safetensors",
        "mini/adapter/chat_template.jinja",
        "mini/adapter/generation_config.json",
        "mini/adapter/tokenizer.json",
        "mini/adapter/tokenizer_config.json",
        "mini/mini-q4_k_m.gguf",
        "mini/Modelfile",
        "mini/Modelfile.jinja",
        "mini/report.html",
        "mini/certificate.json",
        "mini/forge.lock",
        "mini/manifest.json",
        "mini/log.txt",
    }
    assert all((workshop.directory / "runs" / name).stat().st_mode & 0o444 == 0o444 for name in found)
    for name in ("adapter/adapter_config.json", "Modelfile", "manifest.json"):
        assert (workshop.run / name).stat().st_mode & 0o200, f"{name} cannot be edited"


def test_another_name_exports_and_measures_nothing_anew(again: Workshop) -> None:
    """The GGUF is named by its base inside; the certificate names this run's file."""
    again.recipe(name="other")
    answer = again.ship()
    made = {name for name, cached in answer.cached.items() if not cached}
    assert made == {"modelfile", "deploy", "smoke"}
    items = answer.fields["certificate"]["basis"]["items"]
    assert items["gguf"]["where"] == "other-q4_k_m.gguf" and (again.directory / "runs" / "other").is_dir()
    header = read_gguf(again.directory / "runs" / "other" / "other-q4_k_m.gguf")
    assert header.metadata["general.name"] == "tiny-tuned"


@pytest.mark.slow
def test_a_runs_certificate_is_repeated_from_its_file(shipped: tuple[Workshop, Answer]) -> None:
    """The certificate that travels: with the run's own files beside it, by the same verdict and figures."""
    workshop, answer = shipped
    again = workshop.forge("verify", "--recheck", "runs/mini/certificate.json")
    assert again.code == 0, again.said
    assert again.fields["same"] and again.fields["basis"]["items"].keys() >= {"base", "gguf", "adapter"}
    assert again.fields["handovers"] == [
        one for one in answer.fields["certificate"]["handovers"] if one["to"] != "live server"
    ]


def test_the_manifest_tells_how_it_was_made(shipped: tuple[Workshop, Answer]) -> None:
    workshop, answer = shipped
    manifest = workshop.manifest()
    assert manifest["outcome"] == "shipped" and manifest["name"] == "mini" and manifest["format"] == 1
    assert manifest["recipe"]["train"]["learning_rate"] == 1e-3
    assert manifest["base"]["spec"] == "builtin:tiny" and manifest["base"]["revision"] is None
    assert manifest["learned"] == answer.fields["learned"]
    assert manifest["certificate"] == answer.fields["certificate"]
    assert list(manifest["artifacts"]) == list(PURE)
    published = {
        ("train", name): workshop.run / "adapter" / name for name in manifest["artifacts"]["train"]["files"]
    }
    published["export", "model.gguf"] = workshop.run / "mini-q4_k_m.gguf"
    published |= {("modelfile", name): workshop.run / name for name in ("Modelfile", "Modelfile.jinja")}
    for (stage, name), path in published.items():
        told = manifest["artifacts"][stage]["files"][name]
        content = path.read_bytes()
        assert told == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}, path
    for package in ("torch", "transformers", "peft", "trl", "bitsandbytes"):
        assert manifest["artifacts"]["train"]["recorded"][package][0].isdigit(), package
    assert manifest["artifacts"]["export"]["tools"].keys() == {"llama-cpp-python", "llama.cpp converters"}
    assert manifest["facts"]["train"]["steps"] == 4
    digest = manifest["data"]["digest"]
    assert isinstance(digest, str) and len(digest) >= 64


def test_the_lock_holds_what_another_ship_can_be_held_to(shipped: tuple[Workshop, Answer]) -> None:
    workshop, _ = shipped
    text = (workshop.run / "forge.lock").read_text(encoding="utf-8")
    lock, manifest = json.loads(text), workshop.manifest()
    assert str(workshop.directory.parent) not in text and str(workshop.home) not in text
    assert (lock["schema"], lock["format"]) == ("forge-lock", 1)
    assert lock["recipe"]["train.learning_rate"] == 1e-3 and lock["pins"] == manifest["pins"]
    assert lock["inputs"].keys() == {"base", "base's tokenizer", "chat template", "data"}
    assert (lock["inputs"]["base"], lock["inputs"]["data"]) == (
        manifest["base"]["digest"], manifest["data"]["digest"],
    )  # fmt: skip
    assert lock["packages"].keys() >= {
        "forge-ship", "python", "torch", "transformers", "peft", "trl", "tokenizers", "numpy", "llama.cpp",
    }  # fmt: skip
    published = {"train/adapter_model.safetensors": "adapter/adapter_model.safetensors"}
    published |= {"export/model.gguf": "mini-q4_k_m.gguf", "modelfile/Modelfile": "Modelfile"}
    for name, file in published.items():
        assert lock["files"][name] == hashlib.sha256((workshop.run / file).read_bytes()).hexdigest()
    assert lock["trained_on"]["device"] == "cpu" and lock["trained_on"]["threads"]


def copied_lock(shipped: tuple[Workshop, Answer], here: Workshop, **changes: Any) -> None:
    """Beside `here`'s recipe, the lock of the first ship with some of its values changed."""
    lock = json.loads((shipped[0].run / "forge.lock").read_text(encoding="utf-8"))
    for section, change in changes.items():
        lock[section] = lock[section] | change if isinstance(change, dict) else change
    (here.directory / "recipe.lock").write_text(json.dumps(lock), encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run_command(["ship", "recipe.yaml", "--locked", "--json", *arguments]) != 0
    error: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    return error


def test_a_locked_ship_names_each_difference_before_anything_runs(
    shipped: tuple[Workshop, Answer], here: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    copied_lock(shipped, here, inputs={"data": "0" * 64}, packages={"torch": "1.0", "gone": "3"})
    before = tree(here.directory)
    error = refused(capsys, "-o", "train.learning_rate=2e-3")
    torch = shipped[0].manifest()["artifacts"]["train"]["recorded"]["torch"]
    assert error["code"] == 2 and "4 differences" in error["message"]
    assert [(one["field"], one["message"]) for one in error["problems"]] == [
        ("train.learning_rate", "1e-3 → 2e-3"),
        ("data", "its content changed"),
        ("torch", f"1.0 → {torch}"),
        ("gone", "3 → not installed"),
    ]
    assert tree(here.directory) == before
    copied_lock(shipped, here, packages={"torch": "1.0"})
    lock = here.directory / "recipe.lock"
    content = json.loads(lock.read_text())
    del content["recipe"]["train.lora.dora"]  # a field that is newer than the lock
    lock.write_text(json.dumps(content))
    assert [one["field"] for one in refused(capsys, "-o", "train.lora.dora=true")["problems"]] == [
        "train.lora.dora",
        "torch",
    ]
    error = refused(capsys)
    assert (error["code"], len(error["problems"])) == (3, 1) and "pip install torch==1.0;" in error["hint"]


def test_a_lock_that_is_none(
    shipped: tuple[Workshop, Answer], here: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys)
    assert error["code"] == 2 and error["message"].startswith("--locked: there is no recipe.lock, and no ")
    for text in ("", "[]", '{"schema": "another"}', '{"schema": "forge-lock", "format": 1, "recipe": 3}'):
        (here.directory / "recipe.lock").write_text(text)
        assert refused(capsys)["code"] == 2
    copied_lock(shipped, here, format=2)
    assert refused(capsys)["hint"] == "update forge"


def test_a_locked_ship_that_comes_to_something_else_is_exit_5(
    shipped: tuple[Workshop, Answer], again: Workshop
) -> None:
    """The lock is of another machine, which is said; what came of it is compared file by file."""
    copied_lock(shipped, again, files={"modelfile/Modelfile": "0" * 64}, system="Darwin arm64")
    answer = again.ship("--locked", "--until", "modelfile", code=5)
    assert "the lock is of another machine: system Darwin arm64 → " in answer.said
    assert [one["field"] for one in answer.fields["error"]["problems"]] == ["modelfile/Modelfile"]
    assert not (again.run / "forge.lock").exists()


@pytest.mark.slow
def test_a_locked_ship_on_a_clean_store_gives_the_same_digests(
    shipped: tuple[Workshop, Answer], tmp_path: Path
) -> None:
    """Everything is made again, certificate included, and comes to the same bytes."""
    (tmp_path / "here").mkdir()
    clean = Workshop(tmp_path / "here", link_converters(tmp_path / "home"))
    clean.recipe()
    copied_lock(shipped, clean, trained_on={"threads": 99})
    answer = clean.ship("--locked")
    assert not any(answer.cached.values())
    assert "the lock is of another machine: threads 99 → " in answer.said
    assert (clean.run / "forge.lock").read_bytes() == (shipped[0].run / "forge.lock").read_bytes()


def test_the_report_shows_curve_answers_and_sizes(shipped: tuple[Workshop, Answer]) -> None:
    workshop, _ = shipped
    page = (workshop.run / "report.html").read_text(encoding="utf-8")
    assert (
        "<polyline" in page and "<script" not in page and "http" not in page.replace("http://www.w3.org", "")
    )
    assert "There is bacon in this sandwich." in page
    assert str(workshop.home) not in page


def test_the_log_holds_everything_and_pasteable_commands(shipped: tuple[Workshop, Answer]) -> None:
    workshop, _ = shipped
    log = (workshop.run / "log.txt").read_text(encoding="utf-8")
    for stage in STAGES:
        assert f"] {stage}: " in log
    assert f"$ {sys.executable} -m forge.worker\n" in log
    assert "INFO:hf-to-gguf:" in log, "what llama.cpp's converter says"


def test_the_second_ship_finds_every_pure_stage(shipped: tuple[Workshop, Answer], again: Workshop) -> None:
    first = shipped[1]
    answer = again.ship()
    assert answer.cached == {stage: stage in PURE for stage in STAGES}
    assert answer.fields["smoke"] == first.fields["smoke"]
    assert answer.fields["learned"] == first.fields["learned"]
    assert (again.run / "mini-q4_k_m.gguf").read_bytes() == (shipped[0].run / "mini-q4_k_m.gguf").read_bytes()


def test_a_changed_comment_runs_nothing(again: Workshop) -> None:
    """Style row 7."""
    path = again.directory / "recipe.yaml"
    path.write_text("# another comment\n" + path.read_text() + "# and one more\n")
    assert again.ship().cached == {stage: stage in PURE for stage in STAGES}


def test_a_changed_smoke_query_asks_only_that(again: Workshop) -> None:
    again.recipe(smoke=[{"prompt": "Hello!", "expect": ".", "max_tokens": 8}])
    answer = again.ship()
    assert answer.cached == {stage: stage in PURE for stage in STAGES}
    assert [(one["prompt"], one["ok"]) for one in answer.fields["smoke"]] == [("Hello!", True)]


def test_a_smoke_query_that_fails_is_exit_5_and_the_run_is_recorded(again: Workshop) -> None:
    again.recipe(smoke=[{"prompt": "Hello!", "expect": "^never this$", "max_tokens": 8}])
    answer = again.ship(code=5)
    error = answer.fields["error"]
    assert error["code"] == 5 and error["message"] == "1 of 1 smoke queries failed" and error["hint"]
    [problem] = error["problems"]
    assert problem["field"] == "Hello!" and problem["message"].endswith("expected ^never this$")
    manifest = again.manifest()
    assert manifest["outcome"] == "1 of 1 smoke queries failed"
    assert manifest["facts"]["smoke"]["smoke"][0]["ok"] is False
    assert (again.run / "mini-q4_k_m.gguf").is_file(), "the model is shipped all the same"
    asked = again.forge("smoke", "mini")
    assert (asked.code, asked.fields["error"]["problems"]) == (5, [problem])


def test_a_smoke_query_that_holds(again: Workshop, shipped: tuple[Workshop, Answer]) -> None:
    said = shipped[1].fields["smoke"][0]["answer"]
    again.recipe(smoke=[{**RECIPE["smoke"][0], "expect": f"(?i){said[:6].upper()}"}])
    assert again.ship().fields["smoke"][0]["ok"] is True


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str] | None]:
    """The plan: stage -> its reasons, None when it is cached."""
    capsys.readouterr()
    assert run_command(["plan", "recipe.yaml", "--json", *arguments]) == 0
    fields: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {one["name"]: None if one["cached"] else one["reasons"] for one in fields["stages"]}


LOOKS = ["looks at the world: always runs"]


def test_a_plan_names_the_field_that_changed_and_the_stages_behind_it(
    here: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    """Style rows 5 and 6; what waits says for what."""
    here.ship("--until", "verify")
    before = tree(here.directory)
    assert planned(capsys, "-o", "train.learning_rate=2e-3") == {
        "data": None,
        "train": ["`train.learning_rate`: 1e-3 → 2e-3"],
        "validate": ["waits for train"],
        "evaluate": ["waits for train"],
        "export": ["waits for train"],
        "modelfile": ["waits for export"],
        "verify": ["waits for train", "waits for export"],
        "deploy": LOOKS,
        "smoke": LOOKS,
    }
    assert planned(capsys, "-o", "export.quant=q8_0")["export"] == ["`export.quant`: q4_k_m → q8_0"]
    assert planned(capsys, "-o", "verify.learned=warn") == planned(capsys)
    assert tree(here.directory) == before


def test_an_upgraded_llama_cpp_python_exports_again(
    here: Workshop, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here.ship("--until", "verify")
    current = planned(capsys)
    assert [name for name, reasons in current.items() if reasons is None] == list(PURE)
    monkeypatch.setattr(
        "forge.resolve.stage.installed", lambda name: "9.9.9" if name.startswith("llama") else "1.0"
    )
    upgraded = planned(capsys)
    assert [name for name, reasons in upgraded.items() if reasons is None] == [
        name for name in PURE if name not in ("export", "modelfile", "verify")
    ]
    [reason] = upgraded["export"] or []
    assert "llama-cpp-python" in reason and "→ 9.9.9" in reason


def test_the_gguf_answers_in_llama_cpp_with_its_own_template(shipped: tuple[Workshop, Answer]) -> None:
    """The file stands alone: another program loads it and gives the answer that the server gave."""
    answer = shipped[1]
    code = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=512, n_threads=1, verbose=False)
assert "tokenizer.chat_template" in model.metadata
print(model.chat_format)
messages = [{"role": "user", "content": sys.argv[2]}]
reply = model.create_chat_completion(messages, temperature=0, max_tokens=24)
print(json.dumps(reply["choices"][0]["message"]["content"]))
"""
    [query] = answer.fields["smoke"]
    finished = process.run([sys.executable, "-c", code, answer.fields["gguf"], query["prompt"]])
    assert finished.status == 0, finished.output
    *_, chat_format, said = finished.output.splitlines()
    assert chat_format in ("chat_template.default", "chatml")
    assert json.loads(said).strip() == query["answer"]


def test_runs_show_and_gc_tell_of_it(shipped: tuple[Workshop, Answer]) -> None:
    workshop, _ = shipped
    listed = workshop.forge("runs").fields["runs"]
    assert {"name": "mini", "directory": str(workshop.run), "base": "builtin:tiny"}.items() <= next(
        one.items() for one in listed if one["directory"] == str(workshop.run)
    )
    by_directory = workshop.forge("show", str(workshop.run))
    assert by_directory.code == 0 and by_directory.fields["manifest"] == workshop.manifest()
    by_recipe = workshop.forge("show", "recipe.yaml")
    assert by_recipe.fields["run"] == str(workshop.run)
    assert "adapter/adapter_model.safetensors" in by_recipe.fields["files"]
    garbage = workshop.forge("gc")
    assert garbage.fields["deleted"] is False
    # What was asked of the base's header is remembered for every run of it, and belongs to none.
    assert {item["stage"] for item in garbage.fields["items"]} <= {"rehearse"}, "every artifact is of a run"


def test_smoke_asks_again(shipped: tuple[Workshop, Answer]) -> None:
    workshop, answer = shipped
    before = tree(workshop.run)
    again = workshop.forge("smoke", "mini")
    assert again.code == 0 and again.fields["smoke"] == answer.fields["smoke"]
    assert tree(workshop.run) == before


def test_chat_talks_in_the_terminal(shipped: tuple[Workshop, Answer]) -> None:
    workshop, answer = shipped
    [query] = answer.fields["smoke"]
    talked = workshop.forge("chat", "mini", typed=f"{query['prompt']}\n/quit\n")
    assert talked.code == 0 and talked.fields == {"model": "mini"}
    # Greedy or not, a chat samples as the server does: only that it answered can be said.
    assert len(talked.said.partition("> ")[2].partition("> ")[0].strip()) > 0


def test_serve_and_generate(shipped: tuple[Workshop, Answer]) -> None:
    """R3: bulk generation over REST against a served run; Ctrl-C ends the server."""
    workshop, answer = shipped
    [query] = answer.fields["smoke"]
    rows = [{"id": f"row {number}", "prompt": query["prompt"]} for number in range(3)]
    prompts, out = workshop.directory / "prompts.jsonl", workshop.directory / "out.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    serving = workshop.beside("serving")
    with serving.start("serve", str(workshop.run), "--port", "0", "--json") as child:
        lines = child.lines()
        ready = json.loads(next(lines))
        assert ready["model"] == "mini"
        with Client(find(ready["endpoint"])) as client:
            assert client.chat([{"role": "user", "content": query["prompt"]}]).text.strip()
        arguments = (
            "generate",
            str(prompts),
            str(out),
            "--endpoint",
            ready["endpoint"],
            "--max-tokens",
            "24",
        )
        written = workshop.forge(*arguments)
        assert written.code == 0
        counts = {name: written.fields[name] for name in ("written", "skipped", "failed")}
        assert counts == {"written": 3, "skipped": 0, "failed": 0}
        texts = {row["id"]: row["text"].strip() for row in map(json.loads, out.read_text().splitlines())}
        assert texts == {row["id"]: query["answer"] for row in rows}
        assert workshop.forge(*arguments).fields["skipped"] == 3
        child._process.send_signal(signal.SIGINT)
        list(lines)
        assert child.wait(60) == 130
    assert not listens(ready["endpoint"])


def listens(url: str) -> bool:
    address = urlsplit(url)
    try:
        socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=1).close()
    except OSError:
        return False
    return True


def test_two_ships_of_one_recipe_the_second_waits_and_says_for_whom(here: Workshop) -> None:
    """The second says so, and goes on when the first is done."""
    log = here.directory / "errors.txt"
    with contextlib.ExitStack() as stack:
        with runs.hold_run(open_store(), here.run):
            second = stack.enter_context(here.start("ship", "recipe.yaml", "--json"))
            wait_for("the second to wait", lambda: "waiting for process" in log.read_text(), second)
            assert f"mini: waiting for process {os.getpid()} (run mini, since " in log.read_text()
        fields = json.loads(list(second.lines())[-1])
        assert second.wait(60) == 0
    assert {stage["name"] for stage in fields["stages"] if stage["cached"]} == set(PURE)


def test_what_is_kept_serves_on_and_holds_up_no_other_ship(again: Workshop) -> None:
    """U: the ship ends, the server stays until `forge stop`; a second ship takes its place."""
    try:
        _kept_and_replaced(again)
    finally:
        again.forge("stop")


def _kept_and_replaced(again: Workshop) -> None:
    first = again.ship("-o", "deploy.keep=true")
    endpoint = first.fields["endpoint"]
    with Client(find(endpoint)) as client:
        assert client.chat([{"role": "user", "content": RECIPE["smoke"][0]["prompt"]}]).text.strip()
        assert client.properties()["default_generation_settings"]["n_ctx"] == 1024  # all that the model has
    [listed] = again.forge("ps").fields["running"]
    assert (listed["name"], listed["endpoint"], listed["runtime"]) == ("mini", endpoint, "embedded")
    second = again.ship("-o", "deploy.keep=true")
    assert not listens(endpoint)
    assert [one["endpoint"] for one in again.forge("ps").fields["running"]] == [second.fields["endpoint"]]
    assert again.forge("stop", "mini").fields == {"stopped": ["mini"]}
    assert again.forge("ps").fields == {"running": []}
    assert not listens(second.fields["endpoint"])
    _, left = psutil.wait_procs(processes_of(again.home), timeout=10)
    assert not left

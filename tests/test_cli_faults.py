"""Bad input: one line for each problem and a hint, the contract's exit code, nothing half-written."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from forge.cli.main import run_command
from tests.conftest import copy_of_tiny, tree
from tests.hub_stand_in import Hub, StandInRepository

ROWS = [{"prompt": f"Say {number}.", "completion": f"{number}"} for number in range(8)]
RECIPE = "name: mini\nbase: ./base\ndata: {source: rows.jsonl}\n"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@dataclass
class Place:
    """A directory with a sound base, sound rows and a sound recipe, for a test to break."""

    directory: Path
    home: Path
    capsys: pytest.CaptureFixture[str]

    @property
    def base(self) -> Path:
        return self.directory / "base"

    def recipe(self, text: str) -> None:
        (self.directory / "recipe.yaml").write_text(text, encoding="utf-8")

    def configure(self, **fields: object) -> None:
        path = self.base / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    def fail(self, *arguments: str) -> dict[str, Any]:
        """Run a command that must fail, and give its error, places made relative."""
        code = run_command([*arguments, "--json"])
        shown = self.capsys.readouterr()
        assert "Traceback" not in shown.err
        [line] = shown.out.splitlines()
        error: dict[str, Any] = json.loads(line.replace(f"{self.directory}/", ""))["error"]
        assert error["code"] == code != 0
        assert error["hint"], "a hint is missing"
        told = [part for part in shown.err.splitlines() if part.startswith("error: ")]
        assert len(told) >= max(1, len(error["problems"]))
        return error


@pytest.fixture
def place(
    tmp_path: Path, forge_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Place:
    directory = tmp_path / "place"
    directory.mkdir()
    monkeypatch.chdir(directory)
    made = Place(directory, forge_home, capsys)
    copy_of_tiny(made.base)
    write_rows(directory / "rows.jsonl", ROWS)
    made.recipe(RECIPE)
    return made


def problem(message: str, field: str = "", line: int = 0, file: str = "") -> dict[str, object]:
    return {"message": message, "field": field, "file": file or ("recipe.yaml" if line else ""), "line": line}


RECIPES = {
    "misspelt": (
        RECIPE + "train: {learning_rat: 1e-4}\n",
        [problem("unknown key; did you mean learning_rate?", "train.learning_rat", 4)],
    ),
    "wrong type": (
        RECIPE + "train:\n  lora:\n    r: many\n",
        [problem('must be a whole number (got "many")', "train.lora.r", 6)],
    ),
    "missing data": (
        "name: mini\nbase: ./base\ndata:\n  source: row.jsonl\n",
        [problem("no such file: row.jsonl; did you mean rows.jsonl?", "data.source", 4)],
    ),
    "missing base": (
        RECIPE.replace("./base", "./bases/tiny"),
        [problem("no such directory: ./bases/tiny (looked in bases)", "base", 2)],
    ),
    "three faults": (
        RECIPE.replace("rows", "row") + "train:\n  learning_rate: fast\n  lora: {r: 0}\n",
        [
            problem("no such file: row.jsonl; did you mean rows.jsonl?", "data.source", 3),
            problem('must be a number (got "fast")', "train.learning_rate", 5),
            problem("must be at least 1 (got 0)", "train.lora.r", 6),
        ],
    ),
}


@pytest.mark.parametrize("command", ["plan", "ship", "train"])
@pytest.mark.parametrize("case", RECIPES)
def test_a_faulty_recipe_tells_every_problem_with_its_line(place: Place, case: str, command: str) -> None:
    """Style row 12."""
    text, problems = RECIPES[case]
    place.recipe(text)
    before = tree(place.directory.parent)
    error = place.fail(command, "recipe.yaml")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    assert error == {
        "code": 2,
        "message": f"{count} in the recipe recipe.yaml",
        "hint": "correct it and run again",
        "problems": problems,
    }
    assert tree(place.directory.parent) == before


def test_a_missing_recipe(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    error = place.fail("ship", "recip.yaml")
    assert error["problems"] == [problem("no such recipe", file="recip.yaml")]
    assert run_command(["ship", "recip.yaml"]) == 2
    assert capsys.readouterr().err == (
        "error: recip.yaml: no such recipe\nhint: `forge init` writes a recipe to start from\n"
    )


def no_weights(place: Place) -> None:
    (place.base / "model.safetensors").unlink()


def truncated(place: Place) -> None:
    path = place.base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def missing_shard(place: Place) -> None:
    weights = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors", "model.norm.weight": "two"}
    weights["model.norm.weight"] = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": weights}
    (place.base / "model.safetensors.index.json").write_text(json.dumps(index))
    (place.base / "model.safetensors").rename(place.base / "model-00001-of-00002.safetensors")


def pickled(place: Place) -> None:
    (place.base / "model.safetensors").rename(place.base / "pytorch_model.bin")


def unsupported(place: Place) -> None:
    place.configure(architectures=["OPTForCausalLM"], model_type="opt")


def quantized(place: Place) -> None:
    place.configure(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def float8(place: Place) -> None:
    """A file that lost its scales, and a configuration that says nothing."""
    path = place.base / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name in header if name.endswith("up_proj.weight"))
    header[name] |= {"dtype": "F8_E4M3", "shape": [header[name]["shape"][0], 2 * header[name]["shape"][1]]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def gguf_only(place: Place) -> None:
    (place.base / "model.safetensors").rename(place.base / "model.gguf")


def own_code(place: Place) -> None:
    place.configure(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (place.base / "modeling.py").write_text("raise SystemExit('code of the base was run')")


def unknown_family(place: Place) -> None:
    place.configure(model_type="lama")


def no_template(place: Place) -> None:
    (place.base / "chat_template.jinja").unlink()


BASES: dict[str, tuple[Callable[[Place], None], str, str]] = {
    "no weights": (no_weights, "base: no weights: neither model.safetensors nor", "config.json"),
    "truncated": (truncated, "base/model.safetensors: truncated: it has", "copy or download this file again"),
    "a missing shard": (missing_shard, "base: the checkpoint is not whole: ", "fetch the missing shard"),
    "pickled weights": (pickled, "base: only pickled PyTorch weights", "save_pretrained"),
    "OPT": (unsupported, "OPTForCausalLM: OPT has no GGUF form", "serve it with transformers or vLLM"),
    "quantized": (quantized, "base", "use the model that it was quantized from"),
    "float8": (float8, "base: its weights are quantized: model.layers.0.mlp.up_proj.weight is F8", "16 bits"),
    "a GGUF only": (gguf_only, "base: only a GGUF is there", "the hub id that the GGUF was made from"),
    "code of its own": (own_code, "LlamaForCausalLM runs Python code of its own", "trust_remote_code: true"),
    "a family nobody has": (unknown_family, "LlamaForCausalLM: transformers has no language", "config.json"),
    "no chat template": (no_template, "base has no chat template", "instruct version"),
}


@pytest.mark.parametrize("command", ["plan", "ship"])
@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_work_is_refused_before_anything_runs(
    place: Place, case: str, command: str
) -> None:
    """N5, A12, pitfall 53: said before training, with what can be done instead."""
    breaks, message, hint = BASES[case]
    breaks(place)
    before = tree(place.directory)
    error = place.fail(command, "recipe.yaml")
    assert error["code"] == 2
    assert error["message"].startswith(message)
    assert hint in error["hint"]
    assert tree(place.directory) == before
    assert not (place.home / "artifacts").exists()


def test_each_shard_that_is_missing_is_named(place: Place) -> None:
    """Style row 10."""
    missing_shard(place)
    error = place.fail("plan", "recipe.yaml")
    files = {one["file"].rpartition("/")[2] for one in error["problems"]}
    assert "model-00002-of-00002.safetensors" in files


DATA: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no rows": ([], "data.source: rows.jsonl has no rows"),
    "other columns": (
        [{"question": "a", "note": "b"}] * 8,
        "rows.jsonl:1: cannot tell the data's format from its columns: question, note",
    ),
}


@pytest.mark.training
@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_trained_on(place: Place, case: str) -> None:
    rows, message = DATA[case]
    write_rows(place.directory / "rows.jsonl", rows)
    error = place.fail("ship", "recipe.yaml")
    assert (error["code"], error["message"]) == (2, message)
    assert_nothing_made(place)


@pytest.mark.training
def test_a_row_longer_than_the_context(place: Place) -> None:
    """Pitfall 4: compared with the model's positions, before training."""
    long = {"prompt": "Say it.", "completion": "again and " * 2000}
    write_rows(place.directory / "rows.jsonl", [*ROWS, long])
    error = place.fail("ship", "recipe.yaml", "-o", "data.eval=0")
    assert error["code"] == 2
    told = error["message"] + " ".join(one["message"] + one["file"] for one in error["problems"])
    assert "rows.jsonl" in told and "1024" in told, error
    assert_nothing_made(place)


def assert_nothing_made(place: Place) -> None:
    """No artifact, no partial; of the run only what tells of it."""
    assert list((place.home / "artifacts").glob("*/*")) == []
    run_files = {path.name for path in (place.directory / "runs" / "mini").iterdir()}
    assert run_files == {"log.txt", "manifest.json", "report.html"}


def test_no_disk_space_is_told_before_the_first_stage(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12, 10**6))
    error = place.fail("ship", "recipe.yaml")
    assert error["code"] == 4
    assert error["message"].startswith("this ship needs ") and "has 1.0 MB" in error["message"]
    assert "forge gc" in error["hint"]
    assert not list((place.home / "artifacts").glob("*/*"))


def test_the_plan_s_disk_holds_the_certificate_too(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kept GGUF, and an f16 and a quantized file while it is compared; less is refused."""
    assert run_command(["plan", "recipe.yaml", "--json"]) == 0
    disk = json.loads(capsys.readouterr().out)["disk"]
    parts = disk["parts"]
    assert set(parts) == {"adapter", "GGUF", "files to compare with"}
    assert disk["needed"] == sum(parts.values())
    weights = (place.base / "model.safetensors").stat().st_size  # bfloat16, two bytes each as in f16
    assert parts["files to compare with"] == pytest.approx(weights + parts["GGUF"], rel=0.01)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12, disk["needed"] - 1))
    assert place.fail("ship", "recipe.yaml")["code"] == 4


def test_missing_tools_are_told_before_anything_runs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.home / "tools").rename(place.home / "elsewhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    before = tree(place.directory)
    error = place.fail("ship", "recipe.yaml")
    assert error["code"] == 3
    assert {one["message"].split(" is not")[0] for one in error["problems"]} >= {
        "the Python package torch",
        "the Python package trl",
        "the Python package bitsandbytes",
        "the Python package llama_cpp",
    }
    assert "pip install 'forge-ship[train]'" in error["hint"] and "forge setup" in error["hint"]
    assert "llama.cpp's converters are not here yet" in {one["message"] for one in error["problems"]}
    assert tree(place.directory) == before


def test_a_tool_that_two_stages_need_is_missing_once(place: Place) -> None:
    (place.home / "tools").rename(place.home / "elsewhere")
    error = place.fail("ship", "recipe.yaml")
    told = [one["message"] for one in error["problems"]]
    assert told == ["llama.cpp's converters are not here yet"] == [error["message"]]
    assert error["hint"].count("forge setup") == 1


def test_a_stage_that_is_not_there(place: Place) -> None:
    error = place.fail("ship", "recipe.yaml", "--from", "trian")
    assert error == {
        "code": 2,
        "message": "--from trian: this recipe has no such stage",
        "hint": "did you mean train?",
        "problems": [],
    }
    assert not (place.directory / "runs").exists()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    import huggingface_hub

    with Hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield running
        huggingface_hub.close_session()


def of_the_hub(base: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in base.iterdir()}


@pytest.mark.network
def test_a_gated_base(place: Place, hub: Hub) -> None:
    hub.repositories["org/tiny"] = StandInRepository(of_the_hub(place.base), gated=True)
    place.recipe(RECIPE.replace("base: ./base", "base: org/tiny"))
    error = place.fail("ship", "recipe.yaml")
    assert error["code"] == 2 and "org/tiny" in error["message"]
    assert "HF_TOKEN" in error["hint"] or "login" in error["hint"]
    assert not (place.directory / "runs").exists() and not (place.home / "artifacts").exists()


@pytest.mark.network
def test_a_hub_that_is_down(place: Place, hub: Hub) -> None:
    hub.down = 503
    place.recipe(RECIPE.replace("base: ./base", "base: org/tiny"))
    error = place.fail("ship", "recipe.yaml")
    assert error["code"] == 3
    assert "HF_ENDPOINT" in error["hint"]
    assert not (place.directory / "runs").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("deploy: {host: 0.0.0.0}\n", "others than this machine could use the server"),
        ("base: what is this?\n", "is neither a directory nor a hub id"),
        ("data: {source: builtin:yoda, revision: v1}\n", "data.revision: builtin:yoda has none"),
        ("data: {source: builtin:yoda, eval: absent.jsonl}\n", "data.eval: no such file: absent.jsonl"),
        ("data: {source: builtin:yoda, eval: absent}\n", "data.eval: "),
    ],
)
def test_a_plan_refuses_what_a_ship_would_only_find_out(
    lines: str, words: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    section = lines.partition(":")[0]
    text = "".join(line for line in RECIPE.splitlines(True) if not line.startswith(f"{section}:"))
    place.recipe(text + lines)
    assert run_command(["plan", "recipe.yaml"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.network
def test_a_plan_asks_no_hub_and_shows_what_it_does_not_know(
    place: Place, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["org/tiny"] = StandInRepository(of_the_hub(place.base))
    place.recipe(RECIPE.replace("base: ./base", "base: org/tiny"))
    before = tree(place.directory.parent)
    assert run_command(["plan", "recipe.yaml", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["downloads"] == "unknown until fetched" and planned["memory"] is None
    assert hub.requests == []
    assert tree(place.directory.parent) == before


def test_a_plan_says_how_long_the_certificate_will_take(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.recipe(RECIPE)
    assert run_command(["plan", "recipe.yaml", "--json"]) == 0
    shown = capsys.readouterr()
    planned = json.loads(shown.out)["verify"]
    assert planned["measured"] is False and planned["seconds"] > 1
    assert f"verify: about {planned['seconds']:.1f} s, estimated from parameters and cores" in shown.err
    assert run_command(["plan", "recipe.yaml", "--json", "-o", "export.mode=none"]) == 0
    assert json.loads(capsys.readouterr().out)["verify"] is None


def test_a_tracker_that_is_not_installed_is_named_before_anything_runs(place: Place) -> None:
    """G5: it was found after the data stage, as a wrong version of torch."""
    place.recipe(RECIPE + "train: {report_to: [dagshub, flyte]}\n")
    error = place.fail("ship", "recipe.yaml")
    assert error["code"] == 3 and error["message"] == "train.report_to: dagshub, flyte is not installed"
    assert "pip install dagshub flytekit" in error["hint"]
    assert not (place.home / "artifacts").exists()


@pytest.mark.network
def test_offline_a_base_that_is_not_here_is_told(place: Place, hub: Hub) -> None:
    place.recipe(RECIPE.replace("base: ./base", "base: org/tiny"))
    error = place.fail("ship", "recipe.yaml", "--offline")
    assert error["code"] == 2 and "org/tiny" in error["message"]
    assert place.fail("plan", "recipe.yaml", "--fetch", "--offline") == error
    assert hub.requests == []


@pytest.mark.parametrize(
    "command", [["plan", "recipe.yaml"], ["ship", "recipe.yaml"], ["runs"], ["gc"], ["show", "mini"]]
)
def test_a_store_that_is_a_file(place: Place, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (place.directory / "file").write_text("not a directory")
    monkeypatch.setenv("FORGE_HOME", str(place.directory / "file"))
    error = place.fail(*command)
    assert (error["code"], error["message"]) == (2, "the store file is not a directory")
    assert "FORGE_HOME" in error["hint"]


def test_a_store_that_cannot_be_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    (place.directory / "file").write_text("not a directory")
    monkeypatch.setenv("FORGE_HOME", str(place.directory / "file" / "home"))
    error = place.fail("ship", "recipe.yaml")
    assert error["code"] == 2 and "cannot be written" in error["message"] and "FORGE_HOME" in error["hint"]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (["export", "r.yaml", "--split-size", "5M"], "--split-size"),
        (["export", "r.yaml", "--quant", "q8_0", "--plain"], "--quant, --plain"),
        (["modelfile", "r.yaml", "--from", "phi3:mini", "--adapter", "x.gguf"], "--adapter, --from"),
        (["modelfile", "r.yaml", "--jinja"], "--jinja"),
        (["validate", "r.yaml", "--base", "b", "--adapter", "a"], "--base, --adapter"),
        (["verify", "r.yaml", "--max-kl", "1", "--certificate", "c.json"], "--max-kl, --certificate"),
        (["estimate", "r.yaml", "--method", "full"], "--method"),
    ],
)
def test_an_option_that_a_recipe_says_itself_is_refused(
    call: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(call) == 2
    assert f"{named}: not beside a recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    "call",
    [
        ["estimate", "--base", "builtin:tiny"],
        ["validate", "--base", "b", "--adapter", "a"],
        ["verify", "--base", "b", "--gguf", "g.gguf"],
        ["export", "--base", "b", "--out", "o.gguf"],
        ["modelfile", "m.gguf"],
    ],
)
def test_a_field_of_a_recipe_without_one_is_refused(
    call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([*call, "-o", "train.epochs=1"]) == 2
    assert "-o train.epochs=1: sets a field of a recipe, and none is named" in capsys.readouterr().err

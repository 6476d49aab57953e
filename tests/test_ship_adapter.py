"""`export.mode: adapter | auto`, whole ships: the base's GGUF and the adapter's, proved and served as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.chat.modelfile import parse_modelfile
from forge.cli.main import run_command
from forge.errors import DataError
from forge.model.base import BUILTIN
from forge.model.gguf_header import read_gguf
from forge.runs.find import find_model
from tests.conftest import link_converters
from tests.fake_ollama import FakeOllama
from tests.models import make_adapter, make_model
from tests.shipping import Answer, Workshop, processes_of

pytestmark = [pytest.mark.training, pytest.mark.network, pytest.mark.programs]

GGUF, ADAPTER = "mini-f16.gguf", "mini-f16-adapter.gguf"
FILES = {
    "adapter",
    GGUF,
    ADAPTER,
    "Modelfile",
    "Modelfile.jinja",
    "report.html",
    "certificate.json",
    "forge.lock",
    "manifest.json",
    "log.txt",
}


def adopt(place: Workshop, adapter: Path, **changes: Any) -> None:
    """A recipe that ships an adapter made elsewhere, as f16: nothing is trained, and nothing rounded."""
    export: Mapping[str, Any] = changes.pop("export")
    place.recipe(train=None, data=None, export={"quant": "f16", **export}, **changes)
    with (place.directory / "recipe.yaml").open("a", encoding="utf-8") as recipe:
        recipe.write(f'train: {{from: "{adapter}"}}\n')


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with random factors, which change every answer."""
    return make_adapter(BUILTIN / "tiny", tmp_path_factory.mktemp("adapter") / "theirs", lora_alpha=64)


@pytest.fixture(scope="module")
def impure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(BUILTIN / "tiny", tmp_path_factory.mktemp("impure") / "theirs", use_dora=True)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Iterator[tuple[Workshop, Answer]]:
    """The first ship, and what it said. Tests leave its run as it is."""
    root = tmp_path_factory.mktemp("ship")
    (root / "first").mkdir()
    place = Workshop(root / "first", link_converters(root / "home"))
    adopt(place, adapter, export={"mode": "adapter"})
    yield place, place.ship()
    assert processes_of(place.home) == [], "something of the ships is still running"


@pytest.fixture
def again(shipped: tuple[Workshop, Answer], request: pytest.FixtureRequest) -> Workshop:
    """A new directory with the same store."""
    return shipped[0].beside(request.node.name.replace("[", "-").replace("]", "")[:80])


def test_the_pair_is_certified_and_served(shipped: tuple[Workshop, Answer]) -> None:
    """N4, pitfall 52: token ids, logits and the live server, all of the base with its adapter on."""
    place, answer = shipped
    certificate = answer.fields["certificate"]
    assert certificate["ok"] is True, certificate["problems"]
    assert [one["to"] for one in certificate["handovers"]] == ["weights in F16", "GGUF f16", "live server"]
    assert certificate["base"]["kl_mean"] > 0.05, "the adapter changes too little to tell the two apart"
    assert certificate["live"]["handover"]["kl_mean"] < 1e-3
    assert answer.fields["gguf"] == str(place.run / GGUF)
    assert answer.fields["adapter_gguf"] == str(place.run / ADAPTER)
    assert answer.fields["smoke"][0]["ok"] and answer.fields["smoke"][0]["answer"]


def test_the_run_has_both_files_and_says_so(shipped: tuple[Workshop, Answer]) -> None:
    """What a person looks for; `ollama create -f Modelfile` in the run's directory finds both."""
    place, _ = shipped
    assert {path.name for path in place.run.iterdir()} == FILES
    manifest = place.manifest()
    told = manifest["artifacts"]["export"]["files"]
    for name, file in (("model.gguf", GGUF), ("adapter.gguf", ADAPTER)):
        content = (place.run / file).read_bytes()
        assert told[name] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert manifest["facts"]["export"]["mode"] == "adapter"
    assert manifest["facts"]["export"]["merged_because"] == []
    assert read_gguf(place.run / ADAPTER).metadata["general.type"] == "adapter"
    for name in ("Modelfile", "Modelfile.jinja"):
        written = parse_modelfile((place.run / name).read_text(encoding="utf-8"))
        assert (written.base, written.adapter) == (f"./{GGUF}", f"./{ADAPTER}")
    assert "a file of its own, " in (place.run / "report.html").read_text(encoding="utf-8")


def test_a_server_without_the_adapter_fails_the_ship(
    shipped: tuple[Workshop, Answer], again: Workshop, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A seeded fault: deploy starts the bare base. The server is asked outright: the probabilities
    behind a prompt are nearly the base's, even of an adapter that is far from it elsewhere."""
    adopt(again, adapter, export={"mode": "adapter"})
    monkeypatch.chdir(again.directory)
    monkeypatch.setenv("FORGE_HOME", str(again.home))
    monkeypatch.setattr("forge.stages.deploy.adapter_in", lambda artifact: None)
    assert run_command(["ship", "recipe.yaml"]) == 5
    manifest = again.manifest()
    assert manifest["outcome"] == "deploy: the server has adapters on at the scales [], expected are [1.0]"
    assert manifest["certificate"]["broken_stage"] == "deploy"


def test_merged_it_answers_the_same_and_leaves_no_adapter(
    shipped: tuple[Workshop, Answer], again: Workshop, adapter: Path
) -> None:
    """A later merged ship of the run: one file, no ADAPTER line, the same answers."""
    adopt(again, adapter, export={"mode": "adapter"})
    again.ship("--until", "modelfile")
    assert (again.run / ADAPTER).is_file()
    adopt(again, adapter, export={"mode": "merged"})
    merged = again.ship()
    assert {path.name for path in again.run.iterdir()} == FILES - {ADAPTER}
    assert parse_modelfile((again.run / "Modelfile").read_text(encoding="utf-8")).adapter is None
    assert "adapter_gguf" not in merged.fields
    assert merged.fields["smoke"] == shipped[1].fields["smoke"]


def test_a_merged_ship_that_cannot_be_published_leaves_no_base_alone(
    shipped: tuple[Workshop, Answer], again: Workshop, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full as the merged file goes to the run: what lies there is no model, never a wrong one."""
    adopt(again, adapter, export={"mode": "adapter"})
    again.ship("--until", "modelfile")
    adopt(again, adapter, export={"mode": "merged"})
    monkeypatch.chdir(again.directory)
    monkeypatch.setenv("FORGE_HOME", str(again.home))

    def full(source: Path, target: Path) -> None:
        if target.suffix == ".gguf":
            raise DataError("no space left on the device")

    monkeypatch.setattr("forge.runs.publish.publish", full)
    assert run_command(["ship", "recipe.yaml", "--until", "modelfile"]) == 2
    assert list(again.run.glob("*.gguf")) == []


def test_what_names_the_base_alone_says_so(
    shipped: tuple[Workshop, Answer], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A directory with both is both; the file is taken by itself, and the adapter beside it is named."""
    for name in (GGUF, ADAPTER):
        (tmp_path / name).symlink_to(shipped[0].run / name)
    for path in (BUILTIN / "tiny").iterdir():
        (tmp_path / path.name).symlink_to(path)
    for target, named in ((tmp_path, str(tmp_path / ADAPTER)), (tmp_path / GGUF, None)):
        assert run_command(["modelfile", str(target), "--out", str(tmp_path / "Modelfile")]) == 0
        written = parse_modelfile((tmp_path / "Modelfile").read_text(encoding="utf-8"))
        assert written.adapter == named
        assert f"{ADAPTER} lies beside it" in capfd.readouterr().err
    assert find_model(str(tmp_path / GGUF)) == (tmp_path / GGUF, None)
    assert f"taken by itself, without {ADAPTER} beside it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("base", "lora", "said"),
    [
        ("gpt2", {}, "the layers of gpt2 are Conv1D"),
        ("llama", {"targets": ["embed_tokens"]}, "is an embedding"),
    ],
)
def test_what_no_adapter_of_its_own_can_hold_is_refused_before_training(
    base: str, lora: dict[str, Any], said: str, again: Workshop, tmp_path: Path
) -> None:
    """Pitfall 52."""
    changes: dict[str, Any] = {"intermediate_size": 1024} if base == "gpt2" else {}
    model = make_model(tmp_path / "base", base, "home-made", **changes)
    again.recipe(base=str(model), train={"lora": lora}, export={"mode": "adapter"})
    error = again.ship(code=2).fields["error"]
    assert error["message"] == "export.mode: an adapter of its own is only for linear layers"
    assert said in error["problems"][0]["message"]
    assert not again.run.exists()


def test_auto_is_an_adapter_where_it_can_be(
    shipped: tuple[Workshop, Answer], again: Workshop, adapter: Path
) -> None:
    """The same bytes as with `adapter`, so that nothing behind the export runs again."""
    adopt(again, adapter, export={"mode": "auto"})
    answer = again.ship("--until", "verify")
    assert (again.run / ADAPTER).read_bytes() == (shipped[0].run / ADAPTER).read_bytes()
    assert answer.cached["verify"] and not answer.cached["export"]


def test_auto_merges_what_is_not_pure_and_says_why(again: Workshop, impure: Path) -> None:
    """N4, pitfall 52: in the terminal, the JSON, the facts and the report."""
    reason = "DoRA magnitudes have no place in a GGUF adapter"
    adopt(again, impure, export={"mode": "auto"})
    answer = again.ship("--until", "modelfile")
    assert f"merged, since {reason}" in answer.said
    assert answer.fields["merged_because"] == [reason] and "adapter_gguf" not in answer.fields
    assert not (again.run / ADAPTER).exists()
    facts = again.manifest()["facts"]["export"]
    assert (facts["mode"], facts["merged_because"]) == ("merged", [reason])
    assert f"since {reason}" in (again.run / "report.html").read_text(encoding="utf-8")


def test_an_adapter_that_is_not_pure_is_refused_before_anything_runs(again: Workshop, impure: Path) -> None:
    """Pitfall 52: of an adapter made elsewhere its files tell, before the first stage."""
    adopt(again, impure, export={"mode": "adapter"})
    error = again.ship(code=2).fields["error"]
    assert error["message"] == "this adapter has no GGUF form of its own"
    assert [one["message"] for one in error["problems"]] == [
        "DoRA magnitudes have no place in a GGUF adapter"
    ]
    assert not again.run.exists()


def test_the_run_is_asked_again_with_its_adapter(shipped: tuple[Workshop, Answer]) -> None:
    place, answer = shipped
    asked = place.forge("smoke", "mini")
    assert asked.code == 0, asked.said
    assert asked.fields["smoke"] == answer.fields["smoke"]


def test_a_ship_into_ollama_with_the_adapter(
    shipped: tuple[Workshop, Answer], again: Workshop, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model in Ollama is base and adapter; and left running it answers as the embedded server did."""
    adopt(again, adapter, export={"mode": "adapter"}, deploy={"runtime": "ollama"})
    with FakeOllama() as fake:
        monkeypatch.setenv("OLLAMA_HOST", fake.url)
        answer = again.ship()
        assert fake.models["mini:latest"].adapter
    assert answer.fields["smoke"] == shipped[1].fields["smoke"]


@pytest.mark.slow
def test_what_training_saw_with_an_adapter_trained_here(again: Workshop) -> None:
    """QLoRA, `merge_base: nf4`: the base's GGUF is the NF4 base, quantized; a merged checkpoint beside it."""
    export = {"mode": "adapter", "merge_base": "nf4", "keep_merged": True}
    again.recipe(export=export, deploy={"keep": True})
    answer = again.ship()
    try:
        certificate = answer.fields["certificate"]
        assert [one["from"] for one in certificate["handovers"]] == [
            "NF4 base + adapter", "merged", "weights in F16", "GGUF f16", "GGUF q4_k_m",
        ]  # fmt: skip
        assert certificate["ok"] and certificate["live"]["problems"] == []
        assert (again.run / "merged" / "model.safetensors").is_file()
        [listed] = again.forge("ps").fields["running"]
        assert listed["endpoint"] == answer.fields["endpoint"]
    finally:
        again.forge("stop")
    told = json.loads((again.run / "manifest.json").read_text(encoding="utf-8"))["facts"]["export"]
    assert (told["mode"], told["merge_base"]) == ("adapter", "nf4")

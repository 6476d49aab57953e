"""Every kind of recipe ships: LoRA, messages, an adapter made elsewhere, a plain base, other bases; and what
must not ship does not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from forge.adapter.read import read_adapter
from forge.model.gguf_header import read_gguf
from forge.model.safetensors_header import read_header
from tests.conftest import copy_of_tiny
from tests.models import ADDED, change_json, make_model, make_resized
from tests.shipping import PURE, STAGES, Workshop
from tests.vocabularies import trl_template

pytestmark = [pytest.mark.training, pytest.mark.network, pytest.mark.programs]


def test_a_plain_base_ships_without_training(workshop: Workshop) -> None:
    workshop.recipe(train="none", data=None)
    answer = workshop.ship()
    assert list(answer.cached) == ["export", "modelfile", "verify", "deploy", "smoke"]
    assert answer.fields["adapter"] is None and answer.fields["learned"] is None
    assert answer.fields["smoke"][0]["answer"]
    assert {path.name for path in workshop.run.iterdir()} == {
        "mini-q4_k_m.gguf", "Modelfile", "Modelfile.jinja", "report.html", "certificate.json",
        "forge.lock", "manifest.json", "log.txt",
    }  # fmt: skip


def test_a_merged_checkpoint_of_an_earlier_ship_is_not_left(workshop: Workshop) -> None:
    """Beside a GGUF that is not of its weights it would mislead."""
    for kept in (True, False):
        workshop.recipe(train="none", data=None, export={"quant": "f16", "keep_merged": kept})
        workshop.ship("--until", "export")
        assert (workshop.run / "merged").is_dir() == kept


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.campaign)])
def test_a_mixture_of_experts_ships_with_the_default_targets(workshop: Workshop, architecture: str) -> None:
    """vllm #41384, unsloth-zoo #1269: factors on experts would be refused after the training."""
    make_model(workshop.directory / "base", architecture, "home-made")
    workshop.recipe(base="./base", export={"quant": "f16"})
    answer = workshop.ship("--until", "export")
    assert "train.lora.targets: auto means attention beside experts: a router that" in answer.said
    assert "train.method: qlora leaves experts in 32 bits" in answer.said
    layers = read_adapter(workshop.run / "adapter").layers
    assert sorted(layers) == [f"model.layers.{n}.self_attn.{one}_proj" for n in range(2) for one in "koqv"]
    assert workshop.manifest()["facts"]["validate"]["ok"]
    assert read_gguf(workshop.run / "mini-f16.gguf").tensors["blk.0.ffn_up_exps.weight"].shape[0] == 4


@pytest.mark.slow
def test_dora_ships_from_a_4_bit_base(workshop: Workshop) -> None:
    """The lengths of rows start from the NF4 base; merged into either base they are those of training."""
    train = {"lora": {"dora": True, "rslora": True}, "max_steps": 8, "learning_rate": 5e-3}
    workshop.recipe(train=train, verify={"learned": "required"})
    answer = workshop.ship()
    assert list(answer.cached) == list(STAGES)
    assert answer.fields["certificate"]["ok"] is True
    tensors = read_header(workshop.run / "adapter" / "adapter_model.safetensors")
    assert sum(name.endswith(".lora_magnitude_vector") for name in tensors) == 28
    facts = workshop.manifest()["facts"]["validate"]
    assert facts["exports"] == ["merged"]
    nearer = workshop.ship("-o", "export.merge_base=nf4", "--until", "verify")
    assert nearer.cached["train"] and not nearer.cached["export"]
    certificates = [one["certificate"] for one in (answer.fields, nearer.fields)]
    shifts = [one["handovers"][0] for one in certificates]
    assert [one["from"] for one in shifts] == ["as trained (NF4 base + adapter)", "NF4 base + adapter"]
    assert shifts[0]["kl_mean"] > 1e-6 and certificates[1]["ok"]


@pytest.mark.slow
def test_the_base_to_merge_into_is_measured(workshop: Workshop) -> None:
    """Pitfall 22, `export.merge_base: measured`: the choice is in the terminal, the facts and the report."""
    workshop.recipe(export={"merge_base": "measured"})
    answer = workshop.ship("--until", "verify")
    facts = workshop.manifest()["facts"]["export"]
    measured = facts["merge_base_measured"]
    assert facts["merge_base"] == measured["chosen"]
    assert f"merged into the {measured['chosen']} base: {measured['why']}" in answer.said
    assert measured["why"] in (workshop.run / "report.html").read_text(encoding="utf-8")
    again = workshop.ship("--until", "verify")
    assert all(again.cached.values())


@pytest.mark.slow
def test_lora_and_messages_and_then_its_adapter_elsewhere(workshop: Workshop) -> None:
    """B of the contract: `train.method: lora`, messages-format JSONL, `train: {from: ADAPTER}`."""
    turns = [("What is {n} and {n}?", "It is {m}."), ("And one more?", "Then it is {o}.")]
    rows = []
    for n in range(16):
        messages = [{"role": "system", "content": "You count."}]
        for question, said in turns:
            words = {"n": n, "m": 2 * n, "o": 2 * n + 1}
            messages.append({"role": "user", "content": question.format(**words)})
            messages.append({"role": "assistant", "content": said.format(**words)})
        rows.append(json.dumps({"messages": messages}) + "\n")
    (workshop.directory / "rows.jsonl").write_text("".join(rows))
    data = {"source": "rows.jsonl", "eval": 4}
    workshop.recipe(train={"method": "lora"}, data=None)
    text = (workshop.directory / "recipe.yaml").read_text() + f"data: {json.dumps(data)}\n"
    (workshop.directory / "recipe.yaml").write_text(text)
    made = workshop.ship()
    assert list(made.cached) == list(STAGES)
    assert workshop.manifest()["recipe"]["train"]["method"] == "lora"
    assert workshop.manifest()["facts"]["train"]["steps"] == 4

    elsewhere = workshop.beside("adopts")
    shutil.copytree(made.fields["adapter"], elsewhere.directory / "theirs")
    shutil.copy(workshop.directory / "rows.jsonl", elsewhere.directory)
    text = text.replace(f"train: {json.dumps(_train_of(text))}", 'train: {from: "./theirs"}')
    (elsewhere.directory / "recipe.yaml").write_text(text)
    adopted = elsewhere.ship()
    # The same bytes as the adapter made here: what follows is found, its GGUF too.
    expected = {"data": True, "train": False, "validate": True, "evaluate": False, "export": True}
    assert {name: adopted.cached[name] for name in expected} == expected
    assert adopted.fields["smoke"] == made.fields["smoke"]

    (elsewhere.directory / "theirs" / "adapter_model.safetensors").write_bytes(
        b"\x08" + bytes(7) + b"{}      "
    )
    error = elsewhere.ship(code=2).fields["error"]
    assert error["hint"]


@pytest.mark.slow
@pytest.mark.campaign
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("architecture", "vocabulary", "template"),
    [("phi3", "phi-3", None), ("llama", "llama-bpe", "llama3_2"), ("qwen2", "qwen2", None)],
)
def test_the_same_recipe_ships_other_families_with_their_real_vocabularies(
    architecture: str, vocabulary: str, template: str | None, workshop: Workshop
) -> None:
    text = trl_template(template) if template else None
    base = make_model(workshop.directory / "base", architecture, vocabulary, template=text)
    workshop.recipe(base=str(base))
    answer = workshop.ship()
    assert list(answer.cached) == list(STAGES)
    shipped = read_gguf(Path(answer.fields["gguf"]))
    assert shipped.metadata["general.architecture"] == architecture
    assert workshop.manifest()["facts"]["deploy"]["prompts_compared"] > 4
    assert all(workshop.ship().cached[name] for name in PURE)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [None, ["embed_tokens", "lm_head"]])
def test_an_adapter_that_brought_its_chat_tokens_ships(whole: list[str] | None, workshop: Workshop) -> None:
    """Pitfall 6: its tokenizer, its template and every row that came with it; of a tied base both tensors."""
    tiny = copy_of_tiny(workshop.directory / "tiny")
    theirs = make_resized(tiny, workshop.directory / "theirs", modules_to_save=whole)
    template = theirs / "chat_template.jinja"
    text = template.read_text(encoding="utf-8").replace("<|im_start|>", ADDED[0])
    template.write_text(text.replace("<|im_end|>", ADDED[1]), encoding="utf-8")
    change_json(theirs / "tokenizer_config.json", eos_token=ADDED[1])
    workshop.recipe(train=None)
    with (workshop.directory / "recipe.yaml").open("a") as recipe:
        recipe.write("train: {from: ./theirs}\n")
    answer = workshop.ship()
    assert list(answer.cached) == list(STAGES)
    assert answer.fields["certificate"]["ok"] is True
    assert answer.fields["certificate"]["stops"]["token"] == ADDED[1]
    shipped = read_gguf(Path(answer.fields["gguf"]))
    rows = workshop.manifest()["facts"]["validate"]["vocabulary_rows"]
    assert rows in shipped.tensors["token_embd.weight"].shape
    assert ("output.weight" in shipped.tensors) == bool(whole)
    (theirs / "tokenizer.json").unlink()
    error = workshop.forge("plan", "recipe.yaml").fields["error"]
    assert error["code"] == 2 and "tokenizer.save_pretrained" in error["hint"]


def _train_of(text: str) -> dict[str, object]:
    [line] = [line for line in text.splitlines() if line.startswith("train: ")]
    found: dict[str, object] = json.loads(line.removeprefix("train: "))
    return found


@pytest.mark.slow
def test_what_learned_nothing_does_not_ship(workshop: Workshop) -> None:
    """Evaluate judges: no improvement is exit 5, unless the recipe says otherwise."""
    train = {"max_steps": 1, "learning_rate": 1e-12, "warmup_fraction": 0.0}
    workshop.recipe(train=train, verify={"learned": "required"})
    error = workshop.ship(code=5).fields["error"]
    assert error["message"].startswith("nothing was learned: the held-out loss is ")
    assert "verify.learned: warn" in error["hint"]
    assert {path.name for path in workshop.run.iterdir()} == {
        "adapter", "report.html", "manifest.json", "log.txt",
    }  # fmt: skip
    # Judged afresh on the kept measurement: nothing is computed, and the ship goes on.
    workshop.recipe(train=train, verify={"learned": "warn"})
    answer = workshop.ship("--until", "evaluate")
    assert all(answer.cached.values())
    assert "warning: nothing was learned" in answer.said


@pytest.mark.slow
def test_an_adapter_for_another_base_is_refused(workshop: Workshop) -> None:
    workshop.recipe()
    made = workshop.ship("--until", "train")
    other = copy_of_tiny(workshop.directory / "other")
    configuration = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**configuration, "intermediate_size": 512}))
    stand_alone = workshop.forge("validate", "--base", str(other), "--adapter", made.fields["adapter"])
    assert stand_alone.code == 2
    error = stand_alone.fields["error"]
    assert error["message"].startswith(f"{other}: config.json is not that of the weights: 12 layers")
    assert "config.json" in error["hint"]
    assert {one["field"].rpartition(".")[2] for one in error["problems"]} == {
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.slow
def test_stand_alone_validate_and_export_give_what_the_ship_gives(workshop: Workshop) -> None:
    workshop.recipe()
    made = workshop.ship("--until", "modelfile")
    validated = workshop.forge("validate", "--base", "builtin:tiny", "--adapter", made.fields["adapter"])
    assert validated.code == 0
    assert validated.fields["ok"] is True and validated.fields["pure"] is True
    assert validated.fields["exports"] == ["merged", "adapter"] and validated.fields["problems"] == []
    out = workshop.directory / "alone.gguf"
    arguments = ("export", "--base", "builtin:tiny", "--adapter", made.fields["adapter"], "--out", str(out))
    exported = workshop.forge(*arguments)
    assert exported.code == 0 and exported.fields["gguf"] == str(out)
    alone, shipped = read_gguf(out), read_gguf(Path(made.fields["gguf"]))
    assert alone.tensors.keys() == shipped.tensors.keys()
    assert alone.tensor_types == shipped.tensor_types == exported.fields["tensor_types"]
    # The metadata differ in the model's name, the weights in nothing.
    assert out.read_bytes()[-1_000_000:] == Path(made.fields["gguf"]).read_bytes()[-1_000_000:]
    assert sorted(path.name for path in workshop.directory.glob(".*")) == [], "nothing half-made is left"

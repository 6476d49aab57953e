"""Factors of joined experts (`target_parameters`): merged expert by expert, proved by peft's own forward."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.places import Parts, Placed, place
from forge.adapter.read import LoraLayer, read_adapter
from forge.adapter.several import Named, SeveralRequest, hold
from forge.adapter.status import ValidateRequest, validate_adapter
from forge.adapter.vocabulary import Fitted, fit
from forge.errors import DataError
from forge.export import merge
from forge.export.run import GGUF_FILE
from forge.model.checkpoint import open_checkpoint
from forge.verify.experts import experts
from forge.verify.loader import Weights
from forge.verify.tuned import open_model
from tests.models import PEFT_WARNS, change_json, make_adapter, make_model
from tests.specimens import Specimen, write_rows
from tests.test_export_merge import assert_equal
from tests.test_resized import export_of

pytestmark = [
    pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500), PEFT_WARNS,
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]  # fmt: skip

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
# Families as they store experts: apart (gate and up by two names), or joined, as (in, out) or (out, in).
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "granitemoe")
# What llama.cpp takes for granted of them; gpt-oss's down_proj is square, as the hub's is.
FIELDS: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},
    "gpt_oss": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}, "intermediate_size": 256,
    },
}  # fmt: skip
CASES: Mapping[str, Mapping[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "one": {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
    "all-linear": {"target_modules": "all-linear", "target_parameters": []},
    "rslora": {"target_parameters": BOTH, "use_rslora": True, "r": 3},
    "patterns": {
        "target_parameters": BOTH, "rank_pattern": {"experts.gate_up_proj": 5, "q_proj": 2},
        "alpha_pattern": {r"layers\.1\..*down_proj": 64},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("bases"), dict[str, Path]()

    def of(family: str) -> Path:
        if family not in made:
            fields = {"tie_word_embeddings": False, **FIELDS.get(family, {})}
            made[family] = make_model(root / family, family, "home-made", **fields)
        return made[family]

    return of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_equals_peft(family: str, case: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base, options = bases(family), dict(CASES[case])
    if family == "granitemoe":
        options["target_parameters"] = [name.replace("mlp.", "") for name in options["target_parameters"]]
    adapter = make_adapter(base, tmp_path / "adapter", **{"target_modules": ["q_proj"], **options})
    assert_equal(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_is_what_peft_computes(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    """G1: from transformers' and peft's own forward to llama.cpp's, without rounding."""
    base = bases(family)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=BOTH)
    assert validate_adapter(ValidateRequest(base, adapter)).exports == ("merged",)
    specimen = Specimen(base, adapter, write_rows(base, tmp_path), tmp_path)
    export_of(base, adapter, tmp_path / "out", tokenizer=base, quant="f32")
    found = specimen.verify(tmp_path / "out" / GGUF_FILE)
    assert found["ok"], found["problems"]
    assert all(leg["nmse"] < 1e-9 for leg in found["handovers"] if "nmse" in leg)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_router_is_a_layer_like_others(family: str, bases: Callable[[str], Path], tmp_path: Path) -> None:
    base, named = bases(family), [*BOTH, "mlp.gate.weight"]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=named)
    assert len(read_adapter(adapter).layers) == 6
    assert validate_adapter(ValidateRequest(base, adapter)).exports == ("merged",)
    assert_equal(base, adapter, tmp_path / "merged")
    saved = make_adapter(base, tmp_path / "saved", target_modules=["q_proj"], modules_to_save=["gate"])
    assert len(read_adapter(saved).replaced) == 2
    assert validate_adapter(ValidateRequest(base, saved)).exports == ("merged",)
    assert_equal(base, saved, tmp_path / "merged-saved")


def make_apart(base: Path, directory: Path, names: tuple[str, ...], around: str, **options: Any) -> Path:
    """An adapter as transformers 4 had it: factors for each expert."""
    import peft
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(names), task_type="CAUSAL_LM", **options)
    config.save_pretrained(directory)
    made, generator = {}, torch.Generator().manual_seed(3)
    for name, spec in open_checkpoint(base).tensors.items():
        if f".{around}.experts." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            made[f"{module}.lora_A.weight"] = torch.randn(4, spec.shape[1], generator=generator) * 0.05
            made[f"{module}.lora_B.weight"] = torch.randn(spec.shape[0], 4, generator=generator) * 0.05
    save_file(made, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("family", "names", "around"),
    [
        ("mixtral", ("w1", "w2", "w3"), "block_sparse_moe"),
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"), "mlp"),
    ],
)
def test_factors_of_each_expert_apart(
    family: str, names: tuple[str, ...], around: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    """peft joins them as it loads; where that changes their scale, the adapter is refused."""
    base = bases(family)
    adapter = make_apart(base, tmp_path / "adapter", names, around)
    assert validate_adapter(ValidateRequest(base, adapter)).exports == ("merged",)
    assert_equal(base, adapter, tmp_path / "merged")
    export_of(base, adapter, tmp_path / "out", tokenizer=base)
    specimen = Specimen(base, adapter, write_rows(base, tmp_path), tmp_path)
    found = specimen.verify(tmp_path / "out" / GGUF_FILE)
    assert found["ok"], found["problems"]
    changes: tuple[dict[str, Any], ...] = ({"use_rslora": True}, {"alpha_pattern": {names[0]: 64}})
    for number, options in enumerate(changes):
        other = make_apart(base, tmp_path / f"other-{number}", names, around, **options)
        with pytest.raises(DataError, match="peft would join them at another scale"):
            read_adapter(other)


def test_what_does_not_fit_is_refused_by_name(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("mixtral")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[], target_parameters=BOTH)
    assert "it adapts experts or routers" in " ".join(read_adapter(adapter).impurities)

    def problem(on: Path) -> str:
        with pytest.raises(DataError) as refused:
            place(fit(read_adapter(adapter), open_checkpoint(on)))
        return str(refused.value.problems[0])

    fewer = make_model(tmp_path / "fewer", "mixtral", "home-made", num_local_experts=2)
    more = make_model(tmp_path / "more", "mixtral", "home-made", num_local_experts=5)
    other = make_model(tmp_path / "other", "mixtral", "home-made", intermediate_size=256)
    assert "experts.gate_up_proj of expert 2: the base has no such tensor" in problem(fewer)
    assert "it is for 4 experts, the base has more" in problem(more)
    assert "(512, 256) does not fit the base's (256, 256)" in problem(other)
    gpt = bases("gpt_oss")
    square = make_adapter(gpt, tmp_path / "gpt", target_modules=[], target_parameters=["experts.down_proj"])
    place(fit(read_adapter(square), open_checkpoint(gpt)))
    cases: tuple[tuple[dict[str, str], str], ...] = (
        ({"model_type": "qwen3_vl_moe"}, "forge does not know how qwen3_vl_moe stores joined experts"),
        ({"model_type": "qwen3_vl_moe", "peft_version": "0.18.1"}, "peft before 0.19 has them the other way"),
    )
    for changes, words in cases:
        changed = shutil.copytree(gpt, tmp_path / f"gpt-{len(changes)}")
        change_json(changed / "config.json", model_type=changes["model_type"])
        if version := changes.get("peft_version"):
            change_json(square / "adapter_config.json", peft_version=version)
        with pytest.raises(DataError) as refused:
            place(fit(read_adapter(square), open_checkpoint(changed)))
        assert words in str(refused.value.problems[0])
    change_json(adapter / "adapter_config.json", target_parameters=["experts.down_proj"])
    with pytest.raises(DataError, match=r"adapts 1 parameters of .*experts, the file has factors for 2"):
        read_adapter(adapter)


def test_two_adapters_of_experts_side_by_side(bases: Callable[[str], Path], tmp_path: Path) -> None:
    """peft nests a layer for each parameter; the change of each is its own."""
    base = bases("mixtral")
    adapters = tuple(
        Named(f"a{seed}", make_adapter(base, tmp_path / f"a{seed}", seed=seed, target_parameters=BOTH))
        for seed in (1, 2)
    )
    held = hold(SeveralRequest(base, adapters)).adapters
    experts = [{name: x for name, x in one.changes.items() if ".experts." in name} for one in held]
    assert [len(one) for one in experts] == [4, 4] and experts[0] != experts[1]
    assert {name.rpartition(".")[2] for name in experts[0]} == {"gate_up_proj", "down_proj"}


Misread = Callable[[Placed], Placed]


def _of_the_next(placed: Placed) -> Placed:
    return replace(placed, expert=(placed.expert or 0) ^ 1) if placed.layer.experts else placed


def _scaled(times: Callable[[LoraLayer], float]) -> Misread:
    return lambda placed: replace(
        placed, layer=replace(placed.layer, scale=placed.layer.scale * times(placed.layer))
    )


def _other_half(placed: Placed) -> Placed:
    half = placed.layer.b.shape[0] // 2
    is_split = placed.layer.module.endswith("gate_up_proj")
    return replace(placed, first=half - placed.first) if is_split else placed


SEEDED: Mapping[str, tuple[str, Misread]] = {
    "none": ("qwen3_moe", lambda placed: placed),
    "of another expert": ("mixtral", _of_the_next),
    "gate for up": ("qwen3_moe", _other_half),
    "alpha by the file's rank": ("qwen3_moe", _scaled(lambda layer: 1 / (layer.experts or 1))),
    "alpha by the rank, not by its root": ("mixtral", _scaled(lambda layer: layer.rank**-0.5)),
    "only the first expert": (
        "qwen3_moe", lambda placed: _scaled(lambda layer: float(not placed.expert))(placed)
    ),
    "columns of B packed as the rows of A": ("qwen3_moe", lambda placed: placed),
    "transposed": ("gpt_oss", lambda placed: replace(placed, transposed=not placed.transposed)),
}  # fmt: skip


@pytest.mark.parametrize("case", SEEDED)
def test_the_certificate_catches_a_misreading(
    case: str, bases: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The export alone misreads what it places; the reference is peft's own."""
    family, misread = SEEDED[case]
    base = bases(family)
    targets = ["experts.down_proj"] if case == "transposed" else BOTH
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=[], target_parameters=targets, use_rslora=True
    )

    def placed(fitted: Fitted) -> Parts:
        parts = place(fitted)
        return replace(parts, layers={name: misread(one) for name, one in parts.layers.items()})

    monkeypatch.setattr(merge, "place", placed)
    if case.startswith("columns"):
        monkeypatch.setattr(
            merge, "_columns", lambda layer, expert: slice(expert * layer.rank, (expert + 1) * layer.rank)
        )
    specimen = Specimen(base, adapter, write_rows(base, tmp_path), tmp_path)
    export_of(base, adapter, tmp_path / "out", tokenizer=base)
    found = specimen.verify(tmp_path / "out" / GGUF_FILE)
    assert (found["ok"], found["broken_stage"]) == ((True, None) if case == "none" else (False, "merge"))


def test_the_file_is_looked_at_in_the_first_layer_and_the_last(tmp_path: Path) -> None:
    """Of many layers four are: a conversion that goes wrong at the end is seen there."""
    base = make_model(tmp_path / "base", "mixtral", "home-made", num_hidden_layers=7)
    options: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    opened = open_model(Weights(base, make_adapter(base, tmp_path / "adapter", **options)))
    layers = [name.split(".")[2] for name, _, _ in experts(opened)]
    assert (len(layers), layers[0], layers[-1]) == (4, "0", "6")

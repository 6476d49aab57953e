"""Several adapters of one base become one, and what came out is what its combination says: K4, K5."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from forge.adapter import combine as room
from forge.adapter.change import norm, singular_values
from forge.adapter.combine import Combination, Combined, CombineRequest, Weighted, combine
from forge.adapter.read import read_adapter
from forge.adapter.status import ValidateRequest, validate_adapter
from forge.commands.adapters import merge_adapters
from forge.errors import CheckError, DataError
from forge.recipe.training import Lora
from forge.train.lora import with_lora
from tests.models import PEFT_WARNS, change_tensors, load, make_adapter

pytestmark = [PEFT_WARNS, pytest.mark.training, pytest.mark.timeout(900)]

WEIGHTS = (0.7, -0.3)
# What the second of two adapters is like, the first being of rank 8 on every linear layer.
SECOND: Mapping[str, dict[str, Any]] = {
    "another rank": {"r": 4},
    "rsLoRA and other layers": {"use_rslora": True, "r": 16, "target_modules": ["q_proj", "up_proj"]},
    "patterns": {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"q_proj": 64}},
    "one layer's number": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "a regular expression": {"target_modules": r".*\.0\.mlp\.(up|down)_proj"},
}


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("first") / "a", r=8, use_rslora=True)


@pytest.fixture(scope="module")
def second(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("second") / "b", r=8, seed=2)


def merged(
    base: Path, parts: Sequence[Path], out: Path, combination: Combination = "cat", **options: Any
) -> Combined:
    weighted = tuple(Weighted(part, weight) for part, weight in zip(parts, WEIGHTS, strict=False))
    return combine(CombineRequest(base, weighted, base, out, combination, **options))


def assert_weighted_sum(base: Path, parts: Sequence[Path], out: Path) -> None:
    """Every weight of the merged model, against the sum of what peft's own merges of each part add."""
    import torch

    plain = load(base).state_dict()
    wanted = {name: tensor.clone() for name, tensor in plain.items()}
    for part, weight in zip(parts, WEIGHTS, strict=True):
        for name, tensor in load(base, part).state_dict().items():
            wanted[name] += weight * (tensor - plain[name])
    for name, tensor in load(base, out).state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("case", SECOND)
def test_cat_is_the_weighted_sum(case: str, base: Path, first: Path, tmp_path: Path) -> None:
    """K4, K5: whatever ranks, scales and layers the parts have; a weight may be negative."""
    other = make_adapter(base, tmp_path / "b", seed=2, **SECOND[case])
    before = [(path / "adapter_model.safetensors").read_bytes() for path in (first, other)]
    made = merged(base, (first, other), tmp_path / "out")
    assert made.is_exact and made.error < 1e-6
    assert made.forward and made.forward.largest_difference < 1e-4
    assert_weighted_sum(base, (first, other), tmp_path / "out")
    told = validate_adapter(ValidateRequest(base, tmp_path / "out"))
    assert (told.ok, told.pure, told.scale) == (True, True, 1.0)
    # The parts stay as they were: what was merged cannot be taken apart.
    assert before == [(path / "adapter_model.safetensors").read_bytes() for path in (first, other)]


def test_the_mathematics_of_an_adapter(base: Path, first: Path) -> None:
    """C6: a fresh one changes nothing; X (W + s B A)^T is X W^T + s (X A^T) B^T, of the factors' rank."""
    import safetensors.torch
    import torch

    ids = torch.arange(8).unsqueeze(0)
    with torch.inference_mode():
        before = load(base)(ids).logits
        fresh = with_lora(load(base), Lora(r=8), quantized=False, checkpointing=False).eval()
        assert torch.equal(fresh(ids).logits, before)
    layer = read_adapter(first).layers["model.layers.0.mlp.up_proj"]
    factors = safetensors.torch.load_file(first / "adapter_model.safetensors")
    a, b = factors[layer.a.name], factors[layer.b.name]
    plain, tuned = (load(base, adapter).model.layers[0].mlp.up_proj for adapter in (None, first))
    change = (tuned.weight - plain.weight).detach()
    assert torch.linalg.matrix_rank(change, rtol=1e-3) == layer.rank == 8
    values = singular_values([(1.0, layer)])
    assert norm(values) == pytest.approx(float(change.norm()), rel=1e-4)
    assert max(values[8:], default=0.0) < 1e-9
    x = torch.randn(3, 256)
    torch.testing.assert_close(tuned(x), plain(x) + layer.scale * (x @ a.T) @ b.T, atol=1e-5, rtol=1e-4)


def test_the_rank_of_cat_is_the_sum_of_the_ranks(
    base: Path, first: Path, second: Path, tmp_path: Path
) -> None:
    assert merged(base, (first, second), tmp_path / "out").rank == 16
    assert {layer.rank for layer in read_adapter(tmp_path / "out").layers.values()} == {16}
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if "adapter" in path.name) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(base)


def test_svd_is_the_best_of_its_rank(base: Path, first: Path, second: Path, tmp_path: Path) -> None:
    """K5: of the sum's whole rank it is the sum; below, it loses what the singular values say."""
    whole = merged(base, (first, second), tmp_path / "whole", "svd", rank=16)
    assert whole.is_exact and whole.rank == 16
    half = merged(base, (first, second), tmp_path / "half", "svd")
    assert half.rank == 8 and not half.is_exact
    assert half.error == pytest.approx(half.least, rel=1e-3) and 0.05 < half.error < 0.9
    assert half.forward and half.forward.largest_difference > 1e-3


@pytest.mark.parametrize(
    ("combination", "density"),
    [("linear", None), ("ties", 0.5), ("dare_linear", 0.5), ("magnitude_prune_svd", 0.5)],
)
def test_other_combinations_say_what_they_are(
    combination: Combination, density: float | None, base: Path, first: Path, second: Path, tmp_path: Path
) -> None:
    """K5: `linear` adds the factors, so that each part's B is multiplied by the other's A as well."""
    made = merged(base, (first, second), tmp_path / "out", combination, density=density)
    assert not made.is_exact and made.error > 0.1
    assert made.error >= made.least
    assert {layer.error > 0.1 for layer in made.layers.values()} == {True}
    again = merged(base, (first, second), tmp_path / "again", combination, density=density)
    assert again == made  # dare draws by seed


def test_one_adapter_is_scaled(base: Path, first: Path, tmp_path: Path) -> None:
    made = merged(base, (first,), tmp_path / "out", "linear")
    assert made.is_exact and made.rank == 8


def test_linear_of_other_ranks_names_the_way_out(base: Path, first: Path, tmp_path: Path) -> None:
    other = make_adapter(base, tmp_path / "b", r=4)
    with pytest.raises(DataError, match="must have the same r value") as refused:
        merged(base, (first, other), tmp_path / "out", "linear")
    assert "cat takes adapters of any ranks" in refused.value.hint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "DoRA magnitudes"),
        ({"modules_to_save": ["norm"]}, "it carries whole tensors"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "it carries rows of tokens"),
    ],
)
def test_what_has_no_weighted_sum_is_refused(
    options: dict[str, Any],
    words: str,
    base: Path,
    first: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """K5: peft would leave out what is no factor, or take the first adapter's. Before any worker starts."""
    other = make_adapter(base, tmp_path / "b", **options)
    monkeypatch.setattr("forge.commands.adapters.worker.perform", None)
    with pytest.raises(DataError, match=words):
        merge_adapters(str(base), [f"{first}=1", f"{other}=1"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_not_sound_is_named(base: Path, first: Path, tmp_path: Path) -> None:
    import torch

    other = shutil.copytree(first, tmp_path / "b")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    change_tensors(other / "adapter_model.safetensors", {name: torch.full((512, 8), float("nan"))})
    with pytest.raises(CheckError, match="is not sound: 1 problem"):
        merged(base, (first, other), tmp_path / "out")


def test_a_merge_that_went_wrong_is_found(
    base: Path, first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the care for the first part's rsLoRA peft scales the result by the root of its rank."""
    import peft

    whole = peft.LoraConfig.__setattr__

    def forgetful(settings: Any, name: str, value: object) -> None:
        whole(settings, name, settings.use_rslora if name == "use_rslora" and not value else value)

    loaded = room.with_all

    def then_forget(*given: Any) -> Any:
        model = loaded(*given)
        monkeypatch.setattr(peft.LoraConfig, "__setattr__", forgetful)
        return model

    monkeypatch.setattr(room, "with_all", then_forget)
    with pytest.raises(CheckError, match=r"cat: the merged adapter is .* from the weighted sum"):
        merged(base, (first, second), tmp_path / "out")

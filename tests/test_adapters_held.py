"""Adapters side by side on one base, and the command that merges them: K4 to K7, and L's sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.several import Named, SeveralRequest, hold
from forge.adapter.tokenizer import copy_tokenizer
from forge.commands.adapters import ORIGIN, list_adapters, merge_adapters
from forge.errors import CheckError, DataError, RecipeError, StageError
from tests.conftest import link_converters
from tests.models import PEFT_WARNS, load, make_adapter, make_model, make_resized
from tests.shipping import Workshop

pytestmark = [PEFT_WARNS, pytest.mark.training, pytest.mark.timeout(900)]

KINDS: Mapping[str, dict[str, Any]] = {
    "plain": {"r": 8},
    "dora": {"use_dora": True, "r": 4, "target_modules": ["q_proj", "down_proj"]},
    "whole": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Named, ...]:
    root = tmp_path_factory.mktemp("adapters")
    return tuple(
        Named(name, make_adapter(base, root / name, seed=number, **options))
        for number, (name, options) in enumerate(KINDS.items())
    )


def test_each_is_switched_and_measured(base: Path, adapters: tuple[Named, ...]) -> None:
    """K4, K6, K7: listed, active, disabled, deleted, unloaded; with peft's status of each."""
    held = hold(SeveralRequest(base, adapters))
    assert [item.name for item in held.adapters] == list(KINDS)
    assert held.checks == 2 + 1 + 3 * 4 + 2
    assert held.kept_by_unload == ("whole",)  # peft's unload would leave its norm in the base
    for item in held.adapters:
        # To peft a module that another adapter saved whole is irregular: it has nothing of this one.
        assert item.status["active_adapters"] == ([item.name] if item.name == "whole" else "irregular")
        assert item.status["available_adapters"] == sorted(KINDS)
        assert item.status["enabled"] is True and item.status["merged_adapters"] == []
        assert item.logits > 0.01
        for layer in item.layers:
            assert layer.keys() >= {"name", "module_type", "enabled", "active_adapters", "requires_grad"}
    assert [item.modules for item in held.adapters] == [14, 4, 2]


def test_the_size_of_the_change_is_peft_s(base: Path, adapters: tuple[Named, ...]) -> None:
    """L: by layer, over the norm of the weight; of DoRA and of whole tensors too."""
    plain = load(base).state_dict()
    for item, named in zip(hold(SeveralRequest(base, adapters)).adapters, adapters, strict=True):
        tuned = load(base, named.adapter).state_dict()
        wanted = {
            name: float((tensor - plain[name]).norm() / plain[name].norm())
            for name, tensor in tuned.items()
            if not tensor.equal(plain[name])
        }
        changes = {name.removesuffix(".weight"): share for name, share in item.changes.items()}
        assert changes == pytest.approx(
            {name.removesuffix(".weight"): share for name, share in wanted.items()},
            rel=2e-2 if item.name == "whole" else 1e-3,  # a whole module runs in the base's bfloat16
        )


def test_a_state_that_is_not_as_it_should_be_is_named(
    base: Path, adapters: tuple[Named, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """K4: peft that did not switch would answer with another adapter."""
    import peft

    monkeypatch.setattr(peft.PeftModel, "set_adapter", lambda *_, **__: None)
    with pytest.raises(CheckError, match="do not stand side by side") as found:
        hold(SeveralRequest(base, adapters[:2]))
    problems = [str(problem) for problem in found.value.problems]
    assert any(problem.startswith("dora active beside the others: logits are off by") for problem in problems)
    assert "the active adapter, dora: is ['plain'], should be ['dora']" in problems


def test_one_with_rows_of_its_own_has_no_place(
    base: Path, adapters: tuple[Named, ...], tmp_path: Path
) -> None:
    other = make_resized(base, tmp_path / "resized", target_modules=["q_proj", "lm_head", "embed_tokens"])
    with pytest.raises(DataError, match="resized resized the base's embedding to") as refused:
        hold(SeveralRequest(base, (adapters[0], Named("resized", other))))
    assert "by itself" in refused.value.hint


def test_a_base_larger_than_the_memory_is_refused(
    base: Path, adapters: tuple[Named, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge.adapter import several
    from forge.model.estimate import Available

    monkeypatch.setattr(several, "available", lambda: Available(1 << 20, 1 << 20))
    with pytest.raises(StageError, match=r"the base takes 0\.0 GB of memory"):
        hold(SeveralRequest(base, adapters[:1]))


@pytest.mark.parametrize(
    ("adapters", "options", "words"),
    [
        (["a=1", "b"], {}, "b: ADAPTER=WEIGHT"),
        (["a=0"], {}, "a number other than 0"),
        (["a=inf"], {}, "a number other than 0"),
        (["a=1"], {"combination": "ties"}, "keeps a share of the values"),
        (["a=1"], {"density": 0.5}, "cat keeps every value"),
        (["a=1"], {"rank": 4}, "--rank is of the combinations that end in svd, not of cat"),
    ],
)
def test_options_that_cannot_be(
    adapters: list[str], options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    with pytest.raises(RecipeError) as refused:
        merge_adapters("base", adapters, tmp_path / "out", **options)
    assert words in refused.value.message


def test_an_adapter_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="an adapter is never written over"):
        merge_adapters("base", ["a=1"], tmp_path / "out")


def test_a_name_with_a_full_stop_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a\.b: a name has no full stop"):
        list_adapters(str(base), {"a.b": tmp_path})


@pytest.mark.slow
@pytest.mark.programs
def test_what_was_merged_is_exported_and_verified(tmp_path: Path) -> None:
    """K4, K5, L: two adapters by command, then as any other adapter; a run's name stands for its own."""
    base = make_model(tmp_path / "base", "llama")
    run = tmp_path / "runs" / "poet"
    make_adapter(base, run / "adapter", seed=3)
    (run / "manifest.json").write_text("{}")
    copy_tokenizer(base, run / "adapter")
    clerk = make_adapter(base, tmp_path / "clerk", seed=4, r=4, use_rslora=True)
    workshop = Workshop(tmp_path, link_converters(tmp_path / "home"))
    both = ("--base", str(base))
    listed = workshop.forge("adapters", "list", "poet=poet", f"clerk={clerk}", *both)
    assert listed.code == 0, listed.said
    assert "2 adapters on" in listed.said and "14 states as they should be" in listed.said
    out = tmp_path / "blend"
    merged = workshop.forge("adapters", "merge", "poet=0.7", f"{clerk}=0.3", *both, "--out", str(out))
    assert merged.code == 0, merged.said
    assert merged.fields["is_exact"] and merged.fields["rank"] == 12
    assert "cat: the weighted sum" in merged.said
    origin = json.loads((out / ORIGIN).read_text())
    assert [(part["name"], part["weight"]) for part in origin["parts"]] == [("adapter", 0.7), ("clerk", 0.3)]
    assert not math.isnan(origin["error"])
    rough = workshop.forge(
        "adapters", "merge", "poet=0.7", f"{clerk}=0.3", *both, "--out", str(tmp_path / "svd"),
        "--combination", "svd", "--rank", "4",
    )  # fmt: skip
    assert rough.code == 0 and "svd is not the weighted sum" in rough.said
    gguf = tmp_path / "blend.gguf"
    exported = workshop.forge("export", *both, "--adapter", str(out), "--out", str(gguf), "--quant", "f16")
    assert exported.code == 0, exported.said
    verified = workshop.forge("verify", *both, "--adapter", str(out), "--gguf", str(gguf))
    assert verified.code == 0, verified.said
    # With one of its parts instead, the certificate says so.
    wrong = workshop.forge("verify", *both, "--adapter", str(clerk), "--gguf", str(gguf))
    assert wrong.code == 5 and wrong.fields["ok"] is False

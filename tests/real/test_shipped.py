"""A real model from end to end: trained on real text, merged or beside its adapter, in five types, served.

One LoRA is trained on 300 rows and shipped in each form: what is cached is taken from the store. The QLoRA
trains a few steps only. Ten minutes on two cores that are otherwise idle.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.chat.hand_over import MODELFILE, MODELFILE_JINJA
from tests.conftest import link_converters
from tests.models import PEFT_WARNS
from tests.real.docstrings import SYSTEM, docstrings, write_docstring_rows
from tests.shipping import Answer, Workshop, processes_of

pytestmark = [
    pytest.mark.training, pytest.mark.programs, pytest.mark.network, pytest.mark.slow,
    pytest.mark.campaign, pytest.mark.timeout(3600), PEFT_WARNS,
]  # fmt: skip

_QUESTION = "What does `shutil.copy` do?"
_ROWS, _HELD_OUT, _TEXTS = 300, 30, 5000
_TRAIN = {
    "max_steps": None, "epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "lora": {"r": 16, "alpha": 32},
}  # fmt: skip
# The share of top tokens that each type must keep. Measured were 100, 97.5, 96.0, 79.5 and 87.9 %, and of
# another training 90.6 % of q6_k and q4_k_m. Rows of 576 are no multiple of 256, and q5_k_m then takes Q5_1,
# in llama.cpp's own files too, whose grid fits this base badly (docs/certificate.md).
_LEAST_TOP1 = {"f16": 0.995, "q8_0": 0.93, "q6_k": 0.85, "q5_k_m": 0.65, "q4_k_m": 0.80}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """One directory and one store for all ships, so that the LoRA is trained once."""
    root = tmp_path_factory.mktemp("real")
    home, directory = link_converters(root / "home"), root / "here"
    directory.mkdir()
    write_docstring_rows(directory / "rows.jsonl", _ROWS + _HELD_OUT)
    yield Workshop(directory, home)
    assert processes_of(home) == []


def ship(place: Workshop, *settings: str, method: str = "lora", **changes: Any) -> Answer:
    place.recipe(
        base="builtin:smollm2",
        data={"source": "rows.jsonl", "columns": {}, "limit": None, "eval": _HELD_OUT},
        train={**_TRAIN, "method": method, **changes},
        verify={"learned": "required"},
        smoke=[
            {"system": SYSTEM, "prompt": "What does `shutil.copy` do?", "expect": "(?i)cop", "max_tokens": 48}
        ],
    )
    overrides = [part for one in settings for part in ("-o", one)]
    answer = place.forge("ship", "recipe.yaml", *overrides)
    assert answer.code == 0, answer.said
    assert answer.fields["certificate"]["ok"]
    return answer


@pytest.mark.parametrize("quant", _LEAST_TOP1)
def test_each_type_of_the_merged_model(place: Workshop, quant: str) -> None:
    """N1, N5, I2: learned, certified, served, with Modelfiles and an answer that makes sense."""
    merged = quant == "f16"
    answer = ship(place, f"export.quant={quant}", f"export.keep_merged={str(merged).lower()}")
    loss = place.manifest()["facts"]["evaluate"]["loss"]
    assert loss["after"] < 0.9 * loss["before"]
    assert answer.fields["certificate"]["logits"]["top1"] > _LEAST_TOP1[quant]
    assert [one["ok"] for one in answer.fields["smoke"]] == [True]
    assert "held-out rows (30): loss" in answer.said and "q8_0" in answer.said
    for name in (MODELFILE, MODELFILE_JINJA):
        assert f"mini-{quant}.gguf" in (place.run / name).read_text(encoding="utf-8")
    assert (place.run / "merged" / "model.safetensors").is_file() == merged
    assert all(answer.cached[name] for name in ("data", "train", "validate", "evaluate")) or merged


def test_the_adapter_beside_its_base(place: Workshop) -> None:
    answer = ship(place, "export.quant=q8_0", "export.mode=adapter")
    assert Path(answer.fields["adapter_gguf"]).is_file()


def test_a_chat_with_what_was_shipped(place: Workshop) -> None:
    """O1: the run, asked by its name."""
    ship(place, "export.quant=q8_0")
    answer = place.forge("chat", "mini", "--system", SYSTEM, typed=f"{_QUESTION}\n/quit\n")
    assert answer.code == 0, answer.said
    assert "cop" in answer.said.rpartition("/quit ends")[2].lower()


def test_qlora(place: Workshop) -> None:
    """A1, E2: trained on the NF4 base; the held-out rows choose what it is merged into."""
    answer = ship(place, "export.quant=q4_k_m", method="qlora", max_steps=6)
    assert answer.fields["certificate"]["logits"]["top1"] > _LEAST_TOP1["q4_k_m"]


def test_the_tokenizer_gives_llama_cpp_s_ids(smollm2: Path) -> None:
    """J1: 5,000 texts, real and mutilated, with everything that splits a byte-level BPE."""
    import llama_cpp
    import tokenizers

    from forge.model.smollm2 import packaged_gguf

    ours = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    theirs = llama_cpp.Llama(str(packaged_gguf()), vocab_only=True, verbose=False)
    different = [
        text
        for text in texts(_TEXTS)
        if ours.encode(text).ids != theirs.tokenize(text.encode(), add_bos=False, special=True)
    ]
    theirs.close()
    assert different == []


def texts(count: int) -> Iterator[str]:
    """Docstrings, their pieces, and the same with digits, white space and other scripts put in."""
    chance, real = random.Random(7), sorted({*docstrings(), *docstrings().values()})
    strange = [
        "\n", "\n\n", "\t", "  ", "   \n", "\r\n", "007", "1234567", "'s", "'LL", "_", "::", "é", "東京",
        "👋🏽", "Привет", "\ufb01", "\u200b", "\u00a0", "…", "—", "<|im_start|>", "<|im_end|>",
    ]  # fmt: skip
    for number in range(count):
        text = real[number % len(real)]
        for _ in range(number // len(real)):
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chance.choice(strange) + text[at + chance.randrange(3) :]
        yield text

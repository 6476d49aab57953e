"""Preference tuning: pairs to ids, DPO on the tiny base, and what the held-out pairs say of it."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.status import ValidateRequest, validate_adapter
from forge.chat.template import ChatTemplate
from forge.data.account import Prepared
from forge.data.layout import Shape
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE, Settings, prepare
from forge.data.prompt_format import prompt_format
from forge.data.reading import Source
from forge.errors import DataError, InterruptedByUserError
from forge.stages.evaluate import figures, learned, nothing_learned
from forge.train.evaluate import Evaluated, Preferred, evaluate
from forge.train.run import train
from tests.models import PEFT_WARNS, ROWS, evaluated, evaluation, load
from tests.shipping import Workshop
from tests.test_train import arguments
from tests.test_train_kills import at_step

pytestmark = [
    PEFT_WARNS,
    # trl (github.com/huggingface/trl) still sets the old name.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.training,
    pytest.mark.timeout(1500),
]

PAIRS = [{"prompt": prompt, "chosen": answer, "rejected": prompt} for prompt, answer in ROWS.items()]
BETA = 0.1


def prepared(base: Path, directory: Path, rows: list[dict[str, Any]]) -> Path:
    """Pairs, which are the held-out pairs too."""
    prepared_as(Shape(pairs=True), base, directory, rows)
    (directory / HELDOUT_FILE).write_bytes((directory / TRAIN_FILE).read_bytes())
    return directory


def prepared_as(
    shape: Shape, base: Path, directory: Path, rows: list[dict[str, Any]], heldout: float | int = 0
) -> Prepared:
    """As the stage *data* has them for a recipe."""
    from tokenizers import Tokenizer

    source = directory / "rows.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    template = ChatTemplate((base / "chat_template.jinja").read_text(encoding="utf-8"))
    form = prompt_format(template, Tokenizer.from_file(str(base / "tokenizer.json")))
    return prepare(Settings([Source((source,), shape)], heldout), form, 512, directory)


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(base, tmp_path_factory.mktemp("data"), PAIRS)


def preferences(base: Path, adapter: Path, data: Path) -> Evaluated:
    return evaluate(replace(evaluation(base, adapter, data), beta=BETA))


def preferred_of(measured: Evaluated) -> Preferred:
    assert measured.preferred
    return measured.preferred


def test_both_answers_stand_behind_the_same_prompt(base: Path, data: Path) -> None:
    from tokenizers import Tokenizer

    decode = Tokenizer.from_file(str(base / "tokenizer.json")).decode
    for line, pair in zip((data / TRAIN_FILE).read_text().splitlines(), PAIRS, strict=True):
        row = json.loads(line)
        begins = row["labels"].count(-100)
        assert row["rejected_labels"][:begins] == row["labels"][:begins] == [-100] * begins
        assert row["rejected_ids"][:begins] == row["input_ids"][:begins]
        assert row["rejected_labels"][begins:] == row["rejected_ids"][begins:]
        assert decode(row["input_ids"][begins:]).strip() == pair["chosen"]
        assert decode(row["rejected_ids"][begins:]).strip() == pair["rejected"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Hi", "completion": "Hello."}, "are no preference pairs: they have no rejected answer"),
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": "Hello."}, "is the chosen answer too"),
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": None}, "is null"),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.",
                "rejected": "\n\nHuman: Ho\n\nAssistant: Go.",
            },
            "answers another conversation",
        ),
    ],
)
def test_rows_without_two_answers_are_refused(
    row: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        prepared(base, tmp_path, [row])
    assert words in " ".join([refused.value.message, *map(str, refused.value.problems)])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_chosen_answers_are_preferred(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    """C9: forge wraps the model itself, and no copy that trl made of the adapter is left.

    trl's rewards while it trains, and forge's own afterwards, are those of the two models' likelihoods."""
    out = tmp_path / "out"
    given = arguments(
        base, data, out, objective="dpo", beta=BETA, max_steps=12, evaluation_steps=6, dtype="fp32",
        method=method, learning_rate=1e-3,
    )  # fmt: skip
    facts = train(given)
    assert validate_adapter(ValidateRequest(base, out)).ok
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["logs", "work"]  # no copy
    first, last = facts.evaluations
    assert last.loss < first.loss < 0.6932 and last.accuracy == 1.0
    if method == "qlora":
        return
    measured = preferences(base, out, data)
    preferred = preferred_of(measured)
    assert preferred.accuracy == 1.0
    assert preferred.margin == pytest.approx(last.margin, rel=1e-3)
    assert preferred.margin == pytest.approx(_margin(base, out, data), rel=1e-3)
    assert nothing_learned(measured) is None
    assert "the chosen answer preferred in 100%" in figures(measured)
    assert learned(measured).metric == "preference"


def _margin(base: Path, adapter: Path, data: Path) -> float:
    """The mean margin of the rewards, row by row with transformers."""
    import torch

    rows = [json.loads(line) for line in (data / HELDOUT_FILE).read_text().splitlines()]
    total = 0.0
    for model, sign in ((load(base, adapter, merge=False), 1), (load(base), -1)):
        for row in rows:
            for ids, labels, side in (("input_ids", "labels", 1), ("rejected_ids", "rejected_labels", -1)):
                wanted = torch.tensor([row[labels]])
                with torch.inference_mode():
                    mean = model(input_ids=torch.tensor([row[ids]]), labels=wanted).loss
                total -= sign * side * float(mean) * int((wanted[:, 1:] >= 0).sum())
    return BETA * total / len(rows)


def test_going_on_from_an_adapter_compares_with_it(base: Path, data: Path, tmp_path: Path) -> None:
    """The loss begins at ln 2: the reference is the adapter as it was, not the bare base."""
    given = {"objective": "dpo", "learning_rate": 1e-3}
    train(arguments(base, data, tmp_path / "first", max_steps=10, **given))
    out = tmp_path / "out"
    train(arguments(base, data, out, max_steps=4, continue_from=str(tmp_path / "first"), **given))
    losses = [json.loads(line)["loss"] for line in (out / "logs" / "training.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    margins = [preferred_of(preferences(base, tmp_path / name, data)).margin for name in ("first", "out")]
    assert margins[1] > margins[0] > 0


def test_a_stopped_run_goes_on_bit_for_bit(base: Path, data: Path, tmp_path: Path) -> None:
    whole, stopped = (
        arguments(base, data, tmp_path / name, objective="dpo", max_steps=6) for name in ("whole", "stopped")
    )
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedByUserError):
            train(stopped)
    assert str(train(stopped).resumed_from).startswith("checkpoint-")
    adapters = [(request.out / "adapter_model.safetensors").read_bytes() for request in (whole, stopped)]
    assert adapters[0] == adapters[1]


def test_a_margin_that_may_be_chance_teaches_nothing() -> None:
    sure, unsure, against = (
        replace(evaluated(2.0, 2.5), preferred=Preferred(0.9, margin, 0.01, evaluated().loss))
        for margin in (0.02, 0.01, -0.5)
    )
    assert nothing_learned(sure) is None  # though the loss of the chosen answers has risen
    assert "cannot tell one under 0.017 from none" in (nothing_learned(unsure) or "")
    assert "preferred in 90% of 20 held-out pairs, by a margin of -0.5" in (nothing_learned(against) or "")


@pytest.mark.programs
@pytest.mark.network
@pytest.mark.slow
def test_a_whole_ship_of_pairs(workshop: Workshop) -> None:
    """The proofs after training are those of every adapter; the questions' answers are in the report (I2)."""
    columns = {"prompt": "sentence", "chosen": "translation_extra", "rejected": "sentence"}
    workshop.recipe(
        data={"columns": columns, "limit": 48, "eval": 8},
        train={
            "objective": "dpo", "method": "lora", "max_steps": 8, "learning_rate": 1e-3, "evaluation_steps": 4
        },
        verify={"learned": "required"},
    )  # fmt: skip
    answer = workshop.ship()
    assert answer.fields["learned"]["metric"] == "preference"
    assert "both answers are compared" in answer.said
    assert "chosen answer preferred in" in answer.said
    assert "learned: 8 held-out pairs: the chosen answer is preferred in " in answer.said
    assert "held-out pairs: the chosen" in workshop.forge("show", "mini").said
    page = (workshop.run / "report.html").read_text(encoding="utf-8")
    assert "before training" in page and "preferred by the reward of DPO" in page

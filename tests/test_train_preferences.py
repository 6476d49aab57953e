"""KTO and ORPO on the tiny base: answers with a label, pairs taken apart, pairs without a reference."""

from __future__ import annotations

import json
import math
import operator
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.adapter.status import ValidateRequest, validate_adapter
from forge.data.account import Prepared
from forge.data.layout import Shape
from forge.data.prepare import HELDOUT_FILE, TRAIN_FILE
from forge.errors import DataError, InterruptedByUserError, OutOfMemoryError
from forge.model.checkpoint import open_checkpoint
from forge.model.config import read_configuration
from forge.stages.evaluate import figures, learned, nothing_learned
from forge.train.memory import Device, estimate_of, job_of, memory_of
from forge.train.preferences import trainer_rows
from forge.train.request import Trained, TrainRequest
from forge.train.run import train, within_memory
from tests.models import PEFT_WARNS, ROWS, load
from tests.shipping import Workshop
from tests.test_train import arguments
from tests.test_train_kills import at_step
from tests.test_train_pairs import BETA, PAIRS, preferences, prepared, prepared_as

pytestmark = [
    PEFT_WARNS,
    # trl (github.com/huggingface/trl) still sets the old name.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.training,
    pytest.mark.timeout(1500),
]

JUDGED: list[dict[str, Any]] = [
    row
    for prompt, answer in ROWS.items()
    for row in (
        {"prompt": prompt, "completion": answer, "label": True},
        {"prompt": prompt, "completion": prompt, "label": False},
    )
]


def judged(base: Path, directory: Path, rows: list[dict[str, Any]], heldout: float | int = 0) -> Prepared:
    """Answers with a label, as a recipe of KTO reads them."""
    return prepared_as(Shape(pairs=True, labels=True), base, directory, rows, heldout)


@pytest.fixture(scope="module")
def data(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows, which are held out too."""
    directory = tmp_path_factory.mktemp("judged")
    judged(base, directory, JUDGED)
    (directory / HELDOUT_FILE).write_bytes((directory / TRAIN_FILE).read_bytes())
    return directory


@pytest.fixture(scope="module")
def pairs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(base, tmp_path_factory.mktemp("pairs"), PAIRS)


def test_a_label_says_which_answers_are_good(base: Path, tmp_path: Path) -> None:
    """As trl's KTO rows have it: prompt, completion, label; a bad answer is no row that is left out."""
    words = [{**row, "label": "yes" if row["label"] else 0} for row in JUDGED]
    account = judged(base, tmp_path, words)
    assert account.notes["answers labelled good"] == account.notes["answers labelled bad"] == 4
    rows = [json.loads(line) for line in (tmp_path / TRAIN_FILE).read_text().splitlines()]
    assert [row["desirable"] for row in rows] == [row["label"] for row in JUDGED]


@pytest.mark.parametrize(
    ("rows", "heldout", "words"),
    [
        ([{"prompt": "Hi", "completion": "Hello."}] * 2, 0, "they have no rejected answer, and no label"),
        (
            [{**JUDGED[0], "label": "maybe"}, JUDGED[1]],
            0,
            "is 'maybe'; it must say whether the answer",
        ),
        ([JUDGED[0], JUDGED[2]], 0, "no answer to train on is bad"),
        ([JUDGED[1], JUDGED[3]], 0, "no answer to train on is good"),
        (JUDGED, 1, "no answer held out is"),
    ],
)
def test_rows_of_one_kind_are_refused(
    rows: list[dict[str, Any]], heldout: int, words: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        judged(base, tmp_path, rows, heldout)
    assert words in " ".join([refused.value.message, *map(str, refused.value.problems)])
    assert refused.value.hint


def test_each_answer_stands_beside_another_s(base: Path, pairs: Path, data: Path) -> None:
    """Of pairs taken apart, too; never beside itself, in a last batch of one neither."""
    for directory in (pairs, data):
        rows = [json.loads(line) for line in (directory / TRAIN_FILE).read_text().splitlines()]
        for batch in (2, 3, 7, 8):
            made = trainer_rows("kto", rows, batch, 0)
            assert sorted(made["label"]) == [False] * 4 + [True] * 4
            for start in range(0, 8, batch):
                answers = made["completion_ids"][start : start + batch]
                others = made["KL_completion_ids"][start : start + batch]
                # A last batch of one has joined the one before.
                if len(answers) > 1 and start + batch != 7:
                    assert sorted(answers) == sorted(others)
            assert all(map(operator.ne, made["completion_ids"], made["KL_completion_ids"]))
        orders = [trainer_rows("kto", rows, 4, seed)["completion_ids"] for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("kind", ["answers", "pairs"])
def test_good_answers_become_likelier_than_bad_ones(
    kind: str, base: Path, data: Path, pairs: Path, tmp_path: Path
) -> None:
    """KTO: trl's rewards while it trains, and forge's own afterwards, are those of the likelihoods."""
    rows, out = data if kind == "answers" else pairs, tmp_path / "out"
    facts = train(
        arguments(
            base, rows, out, objective="kto", beta=BETA, max_steps=12, evaluation_steps=6, dtype="fp32",
            learning_rate=1e-3, batch_size=8,
        )
    )  # fmt: skip
    assert validate_adapter(ValidateRequest(base, out)).ok
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["logs", "work"]  # no copy
    first, last = facts.evaluations
    assert last.loss < first.loss < 0.5 and last.accuracy is None
    measured = preferences(base, out, rows)
    preferred = measured.preferred
    assert preferred and preferred.accuracy > 0.9 and measured.rows == 4
    assert preferred.margin == pytest.approx(last.margin, rel=1e-3)
    assert preferred.margin == pytest.approx(_margin(base, out), rel=1e-3)
    assert nothing_learned(measured) is None
    if kind == "pairs":
        assert learned(measured).metric == "preference" and preferred.likelier
        return
    assert preferred.likelier is None
    assert "a good answer to a bad one preferred in" in figures(measured)
    assert learned(measured).metric == "judgement"
    assert "4 held-out good answers: preferred to a bad one in" in learned(measured).words


def _margin(base: Path, adapter: Path) -> float:
    """The mean reward of the good answers less that of the bad ones, row by row with transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    total = 0.0
    for model, sign in ((load(base, adapter, merge=False), 1), (load(base), -1)):
        for row in JUDGED:
            turns = [{"role": "user", "content": row["prompt"]}]
            asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            turns += [{"role": "assistant", "content": row["completion"]}]
            ids = tokenizer.apply_chat_template(turns)["input_ids"]
            ids = ids[: len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids("<|im_end|>"))]
            wanted = torch.tensor([[-100] * len(asked) + ids[len(asked) :]])
            with torch.inference_mode():
                mean = model(input_ids=torch.tensor([ids]), labels=wanted).loss
            total -= sign * (1 if row["label"] else -1) * float(mean) * (len(ids) - len(asked))
    return BETA * total / 4


def test_orpo_learns_the_chosen_answers_without_a_reference(base: Path, pairs: Path, tmp_path: Path) -> None:
    """Its first loss is the chosen answers' own and the odds ratio's, as the paper has them."""
    out = tmp_path / "out"
    facts = train(
        arguments(
            base, pairs, out, objective="orpo", beta=BETA, max_steps=12, evaluation_steps=6, dtype="fp32",
            learning_rate=1e-3, batch_size=4,
        )
    )  # fmt: skip
    assert validate_adapter(ValidateRequest(base, out)).ok
    losses = [json.loads(line)["loss"] for line in (out / "logs" / "training.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(_first_loss(base, pairs), rel=1e-3)
    first, last = facts.evaluations
    assert last.loss < first.loss and last.accuracy is None  # of likelihoods, not of what was learned
    assert last.margin is not None and first.margin is not None and last.margin > first.margin
    measured = preferences(base, out, pairs)
    assert measured.preferred and measured.preferred.accuracy == 1.0
    assert measured.loss.after < measured.loss.before  # the chosen answers are learned, too
    assert nothing_learned(measured) is None


def _first_loss(base: Path, pairs: Path) -> float:
    """Of the base: the loss of prompts and chosen answers, less beta x log sigmoid of the log odds ratio."""
    import torch

    model = load(base)
    rows = [json.loads(line) for line in (pairs / TRAIN_FILE).read_text().splitlines()]
    nll, tokens, odds = 0.0, 0, 0.0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            nll += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
            mean = [
                -float(model(input_ids=torch.tensor([row[ids_]]), labels=torch.tensor([row[labels]])).loss)
                for ids_, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))
            ]
            ratio = mean[0] - mean[1] - (math.log1p(-math.exp(mean[0])) - math.log1p(-math.exp(mean[1])))
            odds += math.log(1 / (1 + math.exp(-ratio)))
    return nll / tokens - BETA * odds / len(rows)


@pytest.mark.parametrize("objective", ["kto", "orpo"])
def test_a_stopped_run_goes_on_bit_for_bit(objective: str, base: Path, pairs: Path, tmp_path: Path) -> None:
    """Over a quantized base, whose factors stay in float32."""
    whole, stopped = (
        arguments(base, pairs, tmp_path / name, objective=objective, method="qlora", max_steps=4)
        for name in ("whole", "stopped")
    )
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedByUserError):
            train(stopped)
    assert str(train(stopped).resumed_from).startswith("checkpoint-")
    adapters = [(request.out / "adapter_model.safetensors").read_bytes() for request in (whole, stopped)]
    assert adapters[0] == adapters[1]


def test_the_memory_of_an_objective(base: Path, data: Path, tmp_path: Path) -> None:
    """B4: pairs are two rows each; ORPO's logits are those of every token."""
    tensors, configuration = open_checkpoint(base).tensors, read_configuration(base)
    device = Device("cpu", "any", 1 << 40, 1 << 40, has_bfloat16=False)

    def parts(objective: str) -> Mapping[str, int]:
        train = arguments(base, data, tmp_path / "out", objective=objective, batch_size=8).settings
        return estimate_of(job_of(train, 512, device), tensors, configuration, device).parts

    sft, dpo, orpo, kto = map(parts, ("sft", "dpo", "orpo", "kto"))
    assert sft == kto
    assert dpo["activations"] == orpo["activations"] == 2 * sft["activations"]
    assert orpo["logits"] == 2 * 16 * 512 * (configuration.vocabulary_size or 0) * 4 > dpo["logits"]


@pytest.mark.parametrize("batches", [(4, 2), (3,), (6, 3)])
def test_kto_never_holds_one_row(batches: tuple[int, ...], base: Path, data: Path, tmp_path: Path) -> None:
    """B6: an answer by itself has none to be compared with; memory that runs out is said."""
    tried = []

    def attempt(request: TrainRequest) -> Trained:
        tried.append(request.batch_size)
        raise OutOfMemoryError("the GPU ran out of memory")

    given = arguments(
        base, data, tmp_path / "out", objective="kto", batch_size=batches[0], retry_smaller=True
    )
    with pytest.raises(OutOfMemoryError):
        within_memory(given, attempt)
    assert tuple(tried) == batches


def test_no_advice_for_memory_is_one_row_of_kto(base: Path, data: Path, tmp_path: Path) -> None:
    given = arguments(base, data, tmp_path / "out", objective="kto", batch_size=4)
    tensors, configuration = open_checkpoint(base).tensors, read_configuration(base)
    device = Device("cpu", "a small one", 1 << 34, 1 << 34, has_bfloat16=False)
    job = replace(job_of(given.settings, 64, device), checkpointing=True)
    least = estimate_of(replace(job, batch=2), tensors, configuration, device).total
    for free in (least, least - 1):  # below, the method changes instead
        change = memory_of(job, tensors, configuration, replace(device, free=free)).cheapest_change
        assert change and change["train.batch_size"] == 2


@pytest.mark.programs
@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["kto", "orpo"])
def test_a_whole_ship(objective: str, workshop: Workshop) -> None:
    """The proofs after training are those of every adapter; KTO's rows are single answers with a label."""
    columns = {"prompt": "sentence", "chosen": "translation_extra", "rejected": "sentence"}
    data: dict[str, Any] = {"columns": columns, "limit": 48, "eval": 8}
    if objective == "kto":
        rows = [
            {"prompt": f"There is {word} number {number}.", "completion": answer, "label": good}
            for number in range(24)
            for word, answer, good in (
                ("bacon", f"Bacon number {number}, there is.", True),
                ("bread", f"There is bread number {number}.", False),
            )
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workshop.directory / "judged.jsonl").write_text(text, encoding="utf-8")
        data = {"source": "judged.jsonl", "columns": {}, "eval": 12}
    workshop.recipe(
        data=data,
        train={"objective": objective, "method": "lora", "max_steps": 8, "learning_rate": 1e-3},
        verify={"learned": "required"},
    )
    answer = workshop.ship()
    if objective == "kto":
        assert answer.fields["learned"]["metric"] == "judgement"
        assert "held-out good answers: preferred to a bad one in" in answer.said
        assert "training: 8 steps of 4 answers" in answer.said
        page = (workshop.run / "report.html").read_text(encoding="utf-8")
        assert "of the held-out good answers" in page
    else:
        assert answer.fields["learned"]["metric"] == "preference"
        assert "learned: 8 held-out pairs: the chosen answer is preferred in " in answer.said

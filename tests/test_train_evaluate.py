"""The held-out figures on cases that can be worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from forge.data.prepare import HELDOUT_FILE
from forge.model.safetensors_header import read_header
from forge.train.evaluate import evaluate
from forge.train.figures import Change
from tests.models import PEFT_WARNS, change_tensors, evaluation, load, make_adapter, make_model

pytestmark = [PEFT_WARNS, pytest.mark.training, pytest.mark.timeout(1500)]


def test_evaluation_by_hand(base: Path, data: Path, tmp_path: Path) -> None:
    """I1: a model of zeros knows nothing, so each token costs ln(vocabulary)."""
    import torch

    zero = make_model(tmp_path / "zero", "llama", "home-made")
    rows = read_header(zero / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    blank = torch.zeros(rows, 256, dtype=torch.bfloat16)
    change_tensors(zero / "model.safetensors", {"model.embed_tokens.weight": blank})
    adapter = make_adapter(zero, tmp_path / "adapter")
    told = evaluate(evaluation(zero, adapter, data))
    assert told.loss == Change(round(math.log(rows), 6), round(math.log(rows), 6))
    assert (told.perplexity.before, told.perplexity.after) == pytest.approx((rows, rows), rel=1e-4)
    assert told.exact and (told.exact.before, told.exact.after) == (0, 0)


def test_evaluation_is_that_of_transformers(base: Path, data: Path, tmp_path: Path) -> None:
    """Padding changes nothing: the loss is that of each row alone, weighted by its tokens."""
    import torch

    adapter = make_adapter(base, tmp_path / "adapter")
    told = evaluate(evaluation(base, adapter, data))
    lines = (data / HELDOUT_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for when, model in (("before", load(base)), ("after", load(base, adapter, merge=False))):
        total, count = 0.0, 0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            supervised = int((labels[:, 1:] >= 0).sum())
            with torch.inference_mode():
                total += float(model(input_ids=ids, labels=labels).loss) * supervised
            count += supervised
        assert getattr(told.loss, when) == pytest.approx(total / count, rel=1e-4)
    assert told.loss.before != told.loss.after

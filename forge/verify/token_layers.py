"""Whether peft has the embedding and the output layer that forge reads out of an adapter. Runs in a worker.

What `adapter.vocabulary` decides holds for the export and for the reference alike, so a mistake of its would
be certified. peft itself therefore puts the adapter on the two layers, as it had them in training, and what
they give is compared with what the reference's weights give. The layers between stay without weights.

Not covered: adapters that touch neither layer, which leave nothing to decide.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from forge.adapter.read import Adapter
from forge.adapter.vocabulary import is_of_tokens
from forge.errors import CheckError
from forge.verify.loader import Loader, Weights
from forge.verify.reference import empty_model

_ROWS = 512
_MOST = 1e-4
"""The largest difference, as a share of the largest value: float32 sums differ by 1e-6."""


def are_touched(adapter: Adapter) -> bool:
    """Whether `adapter` says anything of the embedding or the output layer."""
    modules = (f"{module}.weight" for module in adapter.layers)
    return any(is_of_tokens(name) for name in (*modules, *adapter.replaced, *adapter.rows))


def refuse_others(weights: Weights) -> None:
    """Raise `CheckError` when peft's embedding or output layer gives other values than the reference's."""
    import torch

    adapter = weights.adapter
    if adapter is None:
        return
    ours, base = Loader(weights), Loader(replace(weights, plain=True))
    assert ours.fitted is not None
    model = empty_model(weights, ours.fitted.resize)  # tied as training had it, which peft looks at
    layers = {"embedding": model.get_input_embeddings(), "output layer": model.get_output_embeddings()}
    where = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    names = [where[id(module)] for module in layers.values()]
    expected = {}
    for label, module in layers.items():
        either = sorted(names, key=where[id(module)].__ne__)  # its own name first: of two tied one is stored
        expected[label] = copy.deepcopy(module)
        _fill(expected[label], ours.parameter(either, module.weight, linear=False))
        _fill(module, base.parameter(either, module.weight, linear=False))
    if ours.fitted.untied or not ours.fitted.own_head:
        model.tie_weights()
    given = _given(layers["embedding"].weight.shape, adapter)
    tuned = _with_peft(model, adapter)
    found = {"embedding": tuned.get_input_embeddings(), "output layer": tuned.get_output_embeddings()}
    with torch.inference_mode():
        for label, module in expected.items():
            _compare(label, module(given[label]), found[label](given[label]))


def _fill(module: Any, weight: Any) -> None:
    import torch

    for name, empty in module.named_parameters(recurse=False):
        # A bias is one that no adapter changes.
        values = weight if name == "weight" else torch.nn.Parameter(torch.zeros(empty.shape))
        setattr(module, name, values)


def _given(shape: tuple[int, int], adapter: Adapter) -> Mapping[str, Any]:
    """Token ids, those that were trained alone among them, and hidden states."""
    import torch

    trained = [token for rows in adapter.rows.values() for token in rows.tokens]
    spread = torch.linspace(0, shape[0] - 1, _ROWS).long().tolist()
    states = torch.randn((16, shape[1]), generator=torch.Generator().manual_seed(0))
    return {"embedding": torch.tensor(sorted({*spread, *trained})), "output layer": states}


def _with_peft(model: Any, adapter: Adapter) -> Any:
    import peft

    with warnings.catch_warnings():
        # peft warns that what is tied and trained apart is easily merged wrong, which is what this is for.
        warnings.simplefilter("ignore", UserWarning)
        tuned = peft.PeftModel.from_pretrained(
            model, str(adapter.directory), low_cpu_mem_usage=True, torch_device="cpu"
        )
    return tuned.eval().get_base_model()


def _compare(label: str, ours: Any, theirs: Any) -> None:
    difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
    if not difference < _MOST:  # a NaN is none
        raise CheckError(
            f"the adapter's {label} is not what peft has: values differ by {difference:.2g} of the largest",
            hint="merge the adapter with peft and ship that with train: none; please report what made it",
        )

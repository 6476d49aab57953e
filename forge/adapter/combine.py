"""Several adapters of one base merged with weights into one adapter. Runs in a worker.

peft merges (`add_weighted_adapter`), on a base without weights; the adapter that it wrote is then read anew
and compared with the weighted sum of the adapters' changes, layer by layer, by code that shares nothing with
the merge. Where the base fits into memory in float32, peft's own forward is compared too: the adapter that
was written, against all of them active at once, each at its weight.

`cat` is the sum, exactly: its rank is the sum of the ranks. `svd` is the best approximation of a rank, which
is proved. Every other combination is another model than the sum, by the share that is reported.

Not covered, and refused: adapters with anything beside factors of linear layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge.adapter.change import norm, singular_values
from forge.adapter.probe import POSITIONS, logits_of
from forge.adapter.read import Adapter, read_adapter
from forge.adapter.save import save_adapter
from forge.adapter.status import ValidateRequest, validate_adapter
from forge.errors import CheckError, DataError
from forge.model.checkpoint import open_checkpoint
from forge.model.estimate import available
from forge.model.loading import read_transformers

Combination = Literal[
    "cat", "svd", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties",
    "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
PRUNES = ("ties", "dare", "magnitude")
"""What combinations begin with that keep a share of the values, the density."""
# The factors are float32, and so is peft's arithmetic.
_ROUNDING = 1e-5
_LOGITS = 1e-4
_MERGED = "default"  # peft saves an adapter of this name into the directory itself


@dataclass(frozen=True)
class Weighted:
    """An adapter's directory and its weight in the sum."""

    adapter: Path
    weight: float


@dataclass(frozen=True)
class CombineRequest:
    """One adapter in `out` of `parts`, with the tokenizer in `tokenizer`; `rank` is svd's.

    `density` is the share of values that ties, dare and magnitude_prune keep; dare draws it by `seed`.
    """

    base: Path
    parts: tuple[Weighted, ...]
    tokenizer: Path
    out: Path
    combination: Combination
    rank: int | None = None
    density: float | None = None
    sign: Literal["total", "frequency"] = "total"
    seed: int = 0


@dataclass(frozen=True)
class LayerChange:
    """The norm of the merged change, and the share of the weighted sum's that is missing from it."""

    norm: float
    error: float


@dataclass(frozen=True)
class Forward:
    """Logits of the adapter that was written against all adapters at once, on random tokens, in float32."""

    positions: int
    largest_difference: float
    mean_kl: float


@dataclass(frozen=True)
class Combined:
    """What was merged. `error` is over all layers; `least` is what the best adapter of this rank would lose.

    `is_exact`: the adapter is the weighted sum. `forward` is None where the base in float32 takes more
    memory than there is.
    """

    combination: str
    rank: int
    is_exact: bool
    error: float
    least: float
    layers: Mapping[str, LayerChange]
    forward: Forward | None
    bytes_for_forward: int


def combine(request: CombineRequest) -> Combined:
    """Merge the adapters and prove what came out.

    Raises `CheckError` where an adapter is not sound on this base, or the result is not what its combination
    says; `DataError` where adapters cannot be merged.
    """
    for part in request.parts:
        validate_adapter(ValidateRequest(request.base, part.adapter))
    adapters = [read_adapter(part.adapter) for part in request.parts]
    _merge(request, adapters)
    validate_adapter(ValidateRequest(request.base, request.out))
    combined = _compared(request, adapters, read_adapter(request.out))
    if combined.forward and combined.is_exact and combined.forward.largest_difference > _LOGITS:
        raise CheckError(
            f"the merged adapter's logits are {combined.forward.largest_difference:.2g} from those of the "
            f"adapters together, in float32 at most {_LOGITS:g} is rounding",
            hint="report this: the factors are the sum, and peft's forward of them is not",
        )
    return combined


def refuse_uncombinable(adapters: Sequence[Adapter]) -> None:
    """Raise `DataError` for an adapter that has anything beside factors of linear layers."""
    for adapter in adapters:
        if adapter.impurities:
            raise DataError(
                f"{adapter.directory} cannot be merged with others: {'; '.join(adapter.impurities)}",
                hint="merge it into the base (forge export --keep-merged), and train the next one on that",
            )


def _merge(request: CombineRequest, adapters: Sequence[Adapter]) -> None:
    """peft's merge, written to `request.out`."""
    import torch

    names = [f"part-{number}" for number in range(len(request.parts))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied embeddings, which no part adapts
        model = with_all(_without_weights(request.base), _named(names, adapters))
        for name in names:
            # The merged adapter's settings are copied from the first one's: those that choose layers, or
            # scale anew, would choose and scale the others' too.
            settings = model.peft_config[name]
            settings.target_modules = set(_adapted(model, name))
            settings.layers_to_transform = settings.layers_pattern = settings.exclude_modules = None
            settings.use_rslora, settings.init_lora_weights = False, True
        torch.manual_seed(request.seed)
        try:
            model.add_weighted_adapter(
                names,
                [part.weight for part in request.parts],
                _MERGED,
                combination_type=request.combination,
                svd_rank=request.rank,
                svd_full_matrices=False,
                density=request.density,
                majority_sign_method=request.sign,
            )
        except ValueError as refusal:
            raise DataError(
                f"--combination {request.combination}: {refusal}", hint="cat takes adapters of any ranks"
            ) from refusal
        model.set_adapter(_MERGED)
        for name in names:
            model.delete_adapter(name)
    model.peft_config[_MERGED].base_model_name_or_path = str(request.base)
    first = adapters[0]
    same = len({adapter.configuration.get("revision") for adapter in adapters}) == 1
    save_adapter(
        model,
        request.tokenizer,
        request.out,
        base_name=first.base_name or str(request.base),
        base_revision=first.configuration.get("revision") if same else None,
    )


def _without_weights(base: Path) -> Any:
    """The base's modules, each weight of the right shape and no memory.

    On the meta device peft's merge would give meta tensors.
    """
    import accelerate
    import torch
    import transformers

    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(read_transformers(base), dtype=torch.float32)
    for module in model.modules():
        for key, empty in list(module._parameters.items()):
            if empty is not None:
                shape = torch.zeros((1,) * empty.dim()).expand(empty.shape)
                module._parameters[key] = torch.nn.Parameter(shape, requires_grad=False)
    return model


def _named(names: Sequence[str], adapters: Sequence[Adapter]) -> Mapping[str, Path]:
    return dict(zip(names, [adapter.directory for adapter in adapters], strict=True))


def with_all(model: Any, adapters: Mapping[str, Path]) -> Any:
    """`model` with every adapter loaded under its name; the first is active, factors are float32."""
    import peft

    (first, directory), *others = adapters.items()
    tuned = peft.PeftModel.from_pretrained(model, str(directory), adapter_name=first)
    for name, directory in others:
        tuned.load_adapter(str(directory), adapter_name=name)
    return tuned


def _adapted(model: Any, name: str) -> Sequence[str]:
    prefix = "base_model.model."
    return [
        path.removeprefix(prefix)
        for path, module in model.named_modules()
        if name in getattr(module, "lora_A", ())
    ]


def _compared(request: CombineRequest, adapters: Sequence[Adapter], merged: Adapter) -> Combined:
    """The adapter that was written against the weighted sum of what was read of the others."""
    rank = max(layer.rank for layer in merged.layers.values())
    layers, wanted_squares, lost_squares, least_squares = {}, 0.0, 0.0, 0.0
    modules = {name for adapter in adapters for name in adapter.layers}
    if odd := sorted(modules ^ merged.layers.keys()):
        raise CheckError(f"the merged adapter has other layers than its parts: {len(odd)}, such as {odd[0]}")
    for name in sorted(modules):
        terms = [
            (part.weight, adapter.layers[name])
            for part, adapter in zip(request.parts, adapters, strict=True)
            if name in adapter.layers
        ]
        wanted = singular_values(terms)
        own = (1.0, merged.layers[name])
        lost = norm(singular_values([own, *((-weight, layer) for weight, layer in terms)]))
        layers[name] = LayerChange(norm(singular_values([own])), lost / max(norm(wanted), 1e-30))
        wanted_squares += norm(wanted) ** 2
        lost_squares += lost**2
        least_squares += norm(wanted[merged.layers[name].rank :]) ** 2
    total = max(wanted_squares, 1e-60)
    error, least = (lost_squares / total) ** 0.5, (least_squares / total) ** 0.5
    is_exact = error <= _ROUNDING
    if request.combination == "cat" and not is_exact:
        raise CheckError(f"cat: the merged adapter is {error:.2g} from the weighted sum, which it should be")
    if request.combination == "svd" and error > least * (1 + 1e-3) + _ROUNDING:
        raise CheckError(
            f"svd: {error:.3g} of the sum is lost, and the best of rank {rank} loses {least:.3g}"
        )
    needed = 4 * open_checkpoint(request.base).numel * 5 // 4
    forward = _forward(request, adapters) if needed < available().free else None
    return Combined(request.combination, rank, is_exact, error, least, layers, forward, needed)


def _forward(request: CombineRequest, adapters: Sequence[Adapter]) -> Forward:
    """peft's forward of the written adapter, alone, against that of its parts, active together."""
    import peft
    import torch
    import transformers

    names = [f"part-{number}" for number in range(len(adapters))]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore", UserWarning)
        base = transformers.AutoModelForCausalLM.from_pretrained(str(request.base), dtype=torch.float32)
        together = with_all(base, _named(names, adapters)).eval()
        together.base_model.set_adapter(names)
        for module in together.modules():
            for name, part in zip(names, request.parts, strict=True):
                if name in getattr(module, "lora_A", ()):
                    module.scaling[name] *= part.weight
        wanted = logits_of(together).float()
        alone = peft.PeftModel.from_pretrained(together.unload(), str(request.out)).eval()
        there = logits_of(alone).float()
    log_wanted, log_there = wanted.log_softmax(-1), there.log_softmax(-1)
    divergence = (log_wanted.exp() * (log_wanted - log_there)).sum(-1).mean()
    return Forward(POSITIONS, float((wanted - there).abs().max()), max(0.0, float(divergence)))

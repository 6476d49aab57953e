"""The reference: transformers' own modules in float32, one decoder layer in memory at a time.

The model is built on the meta device. A hook before each decoder layer reads its weights from the
checkpoint, makes them float32 and adds the adapter; a hook behind it drops them. Embedding, final
norm and head come and go in the same way. So the modules run unchanged, whatever the family, and
the peak is one layer, the embedding and the activations of the sampled rows.

Where the adapter resized the embedding, or parted it from the output layer, the model is built so. The
arithmetic is float32, of an NF4 base too.

Not covered, and refused: encoder-decoders, and what `loader` does not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from forge import report
from forge.errors import DataError
from forge.verify.loader import DAMAGED, Loader, Weights
from forge.verify.sample import Sample


def logits(weights: Weights, sample: Sample, label: str) -> Any:
    """Logits at the sampled positions: float32, (positions, vocabulary), in the order of the sample.

    Raises `DataError` for weights that are not finite, not whole, or not those of the modules, and
    for an adapter that has parts without a place.
    """
    import torch

    loader = Loader(weights)
    model = empty_model(weights, loader.fitted.configure if loader.fitted else None)
    head = model.get_output_embeddings()
    if head is None:
        raise DataError(f"{type(model).__name__} has no output layer: it gives no logits")
    width = max(map(len, sample.rows))
    # Causal: what stands behind a position does not change it, so the padding needs no mask.
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in sample.rows])
    rows = torch.tensor([row for row, _ in sample.positions])
    places = torch.tensor([place for _, place in sample.positions])

    def only_sampled(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0][rows, places].unsqueeze(0), *given[1:])

    with torch.inference_mode(), _streamed(model, loader, label):
        hook = head.register_forward_pre_hook(only_sampled)
        found = model(input_ids=ids, use_cache=False).logits[0].float()
        hook.remove()
    loader.refuse_unused()
    if not torch.isfinite(found).all():
        raise DataError(f"{weights.base}: the logits of the reference are not finite", hint=DAMAGED)
    return found.numpy()


def greedy(weights: Weights, made: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Any]:
    """Whether the reference would have written the same: every token is its most likely one too.

    One pass over prompt and answer tells, since up to the first other token both texts are the same.
    """
    rows = tuple((*prompt, *answer) for prompt, answer in made)
    places = tuple(
        (row, len(prompt) - 1 + at) for row, (prompt, answer) in enumerate(made) for at in range(len(answer))
    )
    taught = Sample(rows, places, tuple(True for _ in places), len(rows))
    best = logits(weights, taught, "reference (greedy answers)").argmax(axis=1).tolist()
    same, firsts, at = 0, [], 0
    for _, answer in made:
        wrong = next((step for step, token in enumerate(answer) if best[at + step] != token), None)
        same += wrong is None
        firsts.append(wrong)
        at += len(answer)
    return {"prompts": len(made), "same": same, "first_difference": firsts}


def empty_model(weights: Weights, change: Callable[[Any], None] | None = None) -> Any:
    """The model without weights; its buffers (rotary frequencies) are computed, not loaded.

    `change` is given transformers' configuration first. Raises `DataError` for an unknown family.
    """
    import accelerate
    import torch
    import transformers

    remote = weights.trust_remote_code
    configuration = transformers.AutoConfig.from_pretrained(weights.base, trust_remote_code=remote)
    if change:
        change(configuration)
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            model = transformers.AutoModelForCausalLM.from_config(
                configuration, dtype=torch.float32, trust_remote_code=remote
            )
    except (ValueError, KeyError) as error:
        raise DataError(f"transformers cannot run {weights.base}: {error}") from error
    model.tie_weights()
    return model.eval()


@contextmanager
def _streamed(model: Any, loader: Loader, label: str) -> Iterator[None]:
    """Weights come before each unit's forward and go behind it."""
    units = list(_units(model))
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    done = 0

    def load(unit: Any, given: Any) -> None:
        for module in unit.modules():
            for key, empty in list(module._parameters.items()):
                if empty is not None and empty.is_meta:
                    linear = _is_quantized_in_training(module, model)
                    module._parameters[key] = loader.parameter(names[id(empty)], empty, linear)

    def drop(unit: Any, given: Any, made: Any) -> None:
        nonlocal done
        done = min(done + 1, len(units))
        report.advance(label, done, len(units))
        for module, kept in empties[id(unit)]:
            module._parameters.update(kept)

    empties = {id(unit): [(one, dict(one._parameters)) for one in unit.modules()] for unit in units}
    hooks = [unit.register_forward_pre_hook(load) for unit in units]
    hooks += [unit.register_forward_hook(drop) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if done < len(units):
            report.advance(label, len(units), len(units))


def _units(model: Any) -> Iterator[Any]:
    """What is loaded at once: each decoder layer, and every module with weights outside of them."""
    layers = set(getattr(model, "_no_split_modules", None) or ())

    def walk(module: Any) -> Iterator[Any]:
        own = any(parameter is not None for parameter in module._parameters.values())
        if own or type(module).__name__ in layers:
            yield module
            return
        for child in module.children():
            yield from walk(child)

    return walk(model)


def _is_quantized_in_training(module: Any, model: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()

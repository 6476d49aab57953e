"""What a run came to in figures, for comparing it with others.

All of it is read from the manifest; a figure that the run does not have, or that an older version did not
write down, is None. Not covered: whether two machines measure the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forge.errors import DataError
from forge.runs.files import MANIFEST
from forge.runs.manifest import Logits, Manifest, RunView, read_manifest


@dataclass(frozen=True)
class Figures:
    """`exact_before` and `exact_after` are shares of the short held-out rows; `gguf_bytes` of all its files.

    `ship_seconds` are those of the last ship, in which the stages of `cached` took none.
    """

    trainable_parameters: int | None = None
    steps: int | None = None
    heldout_rows: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    exact_before: float | None = None
    exact_after: float | None = None
    quant: str | None = None
    gguf_bytes: int | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    perplexity_reference: float | None = None
    perplexity_gguf: float | None = None
    peak_memory_bytes: int | None = None
    training_seconds: float | None = None
    export_seconds: float | None = None
    ship_seconds: float | None = None
    cached: int | None = None


@dataclass(frozen=True)
class FigureColumn:
    """How a figure is called, and written for people."""

    figure: str
    label: str
    write: Callable[[float], str]

    def of(self, figures: Figures) -> str:
        """The figure in words; empty where there is none."""
        value = self.number(figures)
        return "" if value is None else self.write(value)

    def number(self, figures: Figures) -> float | None:
        value: float | None = getattr(figures, self.figure)
        return value


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _fine(value: float) -> str:
    return f"{value:.4f}"


def _small(value: float) -> str:
    return f"{value:.2g}"


def _share(value: float) -> str:
    return f"{value:.2%}"


def _size(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


SHOWN: tuple[FigureColumn, ...] = (
    FigureColumn("trainable_parameters", "trainable parameters", _whole),
    FigureColumn("steps", "steps", _whole),
    FigureColumn("heldout_rows", "held-out rows", _whole),
    FigureColumn("loss_before", "held-out loss before", _fine),
    FigureColumn("loss_after", "held-out loss", _fine),
    FigureColumn("exact_before", "exact answers before", _share),
    FigureColumn("exact_after", "exact answers", _share),
    FigureColumn("gguf_bytes", "file size", _size),
    FigureColumn("kl_mean", "KL mean", _small),
    FigureColumn("kl_max", "KL max", _small),
    FigureColumn("top1", "top-1", _share),
    FigureColumn("perplexity_reference", "perplexity, reference", _fine),
    FigureColumn("perplexity_gguf", "perplexity, file", _fine),
    FigureColumn("peak_memory_bytes", "training memory", _size),
    FigureColumn("training_seconds", "training time", _seconds),
    FigureColumn("export_seconds", "export time", _seconds),
    FigureColumn("ship_seconds", "last ship", _seconds),
    FigureColumn("cached", "stages from the store", _whole),
)


def read_whole_manifest(directory: Path) -> Manifest:
    """The run's manifest; raises `DataError` for one that cannot be read."""
    manifest = read_manifest(directory)
    if not manifest.name:
        raise DataError(f"{directory / MANIFEST} cannot be read", hint="ship its recipe again")
    return manifest


def figures_of(manifest: Manifest) -> Figures:
    """Raises `DataError` for a certificate that is none."""
    facts = manifest.read_facts()
    evaluate, loss, exact = facts.evaluate, facts.evaluate.loss, facts.evaluate.exact
    try:
        certified = manifest.read_certificate()
    except ValueError as reason:
        raise DataError(
            f"the certificate of {manifest.name} cannot be read: {reason}", hint="ship its recipe again"
        ) from None
    logits = certified.logits if certified else Logits()
    files = manifest.artifacts["export"].files if "export" in manifest.artifacts else {}
    ggufs = [file.bytes for name, file in files.items() if name.endswith(".gguf")]
    return Figures(
        trainable_parameters=facts.train.trainable_parameters,
        steps=facts.train.steps,
        heldout_rows=evaluate.rows or None,
        loss_before=loss.before if loss else None,
        loss_after=loss.after if loss else None,
        exact_before=exact.before / exact.rows if exact and exact.rows else None,
        exact_after=_exact_after(facts),
        quant=facts.export.quant,
        gguf_bytes=sum(ggufs) if ggufs else None,
        kl_mean=logits.kl_mean,
        kl_max=logits.kl_max,
        top1=logits.top1,
        perplexity_reference=logits.perplexity_reference,
        perplexity_gguf=logits.perplexity_gguf,
        peak_memory_bytes=facts.train.peak_memory_bytes,
        training_seconds=facts.train.seconds,
        export_seconds=facts.export.seconds,
        ship_seconds=round(sum(stage.seconds for stage in manifest.stages), 2) if manifest.stages else None,
        cached=sum(stage.cached for stage in manifest.stages) if manifest.stages else None,
    )


def _exact_after(facts: RunView) -> float | None:
    """Of the shipped file behind its server where that was asked, else of the tuned model."""
    exact, served = facts.evaluate.exact, facts.smoke.heldout
    if exact is None or not exact.rows:
        return None
    return (served.exact if served else exact.after) / exact.rows

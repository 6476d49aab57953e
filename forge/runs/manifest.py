"""What the last ship of a run wrote down of it: its manifest, and what it gives Ollama.

The only reading of `manifest.json`. A run of an older version lacks fields, which then have their defaults;
what a stage adds besides, or a newer version, is in `others` and stays in the file's JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge import report
from forge.chat.hand_over import MODELFILE_JINJA, LeftOut, read_modelfile
from forge.chat.modelfile import Modelfile
from forge.codec import from_plain, to_plain
from forge.files import kept_json
from forge.runs.files import MANIFEST
from forge.train.figures import Change, Exact, Heldout

if TYPE_CHECKING:
    from forge.recipe.schema import Recipe

SCHEMA, FORMAT = "forge-manifest", 1


@dataclass(frozen=True)
class Pins:
    """What later ships of the run must find again: the commits of hub names."""

    base: str | None = None
    base_revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BaseMade:
    """The base that was shipped; `digest` is that of its files."""

    spec: str | None = None
    revision: str | None = None
    licence: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class DataMade:
    """The data that was read."""

    digest: str | None = None


@dataclass(frozen=True)
class Prompt:
    """How the template was used."""

    end_of_turn: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    variables_read: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileMade:
    """One file of an artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ArtifactRecord:
    """An artifact of a stage: `recorded` and `tools` are packages and their versions."""

    key: str
    digest: str
    recorded: Mapping[str, str] = field(default_factory=dict)
    tools: Mapping[str, str] | None = None
    files: Mapping[str, FileMade] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """The figure before and after training, over so many held-out rows: exact_match, heldout_loss,
    preference (the share of pairs whose chosen answer has the larger reward of DPO, of which the base has 0),
    or judgement (the same of each good answer with each bad one, where they are no pairs).

    `served`: `after` was asked of the shipped file behind its server.
    """

    metric: str
    before: float
    after: float
    rows: int
    served: bool = False

    @property
    def words(self) -> str:
        """What a person is shown of it."""
        match self.metric:
            case "exact_match":
                where = "the shipped file behind its server" if self.served else "the tuned model"
                shares = f"base {self.before:.0%}, {where} {self.after:.0%}"
                return f"{self.rows} held-out rows, exact answers: {shares}"
            case "preference":
                return f"{self.rows} held-out pairs: the chosen answer is preferred in {self.after:.0%}"
            case "judgement":
                return f"{self.rows} held-out good answers: preferred to a bad one in {self.after:.0%}"
            case _:
                return f"{self.rows} held-out rows: loss {self.before:.4f} -> {self.after:.4f}"


@dataclass(frozen=True)
class StageRun:
    """A stage in the ship: found in the store, or run."""

    name: str
    cached: bool
    seconds: float


@dataclass(frozen=True)
class SmokeAnswer:
    """A smoke query and its answer."""

    prompt: str
    answer: str
    ok: bool


@dataclass(frozen=True)
class DataView:
    """Of the stage *data*: the tokens of a training row at most."""

    max_length: int = 0


@dataclass(frozen=True)
class TrainView:
    """Of the stage *train*: nothing of an adapter that was adopted.

    `peak_memory_bytes` are the GPU's, else the process's; `seconds` those of a run that was not stopped.
    """

    trainable_parameters: int | None = None
    steps: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    device: str | None = None
    compute: str | None = None
    processor: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class EvaluateView:
    """Of the stage *evaluate*: nothing where no row was held out."""

    rows: int = 0
    loss: Change | None = None
    perplexity: Change | None = None
    exact: Exact | None = None


@dataclass(frozen=True)
class ExportView:
    """Of the stage *export*: merged or adapter, and the type of the file that is served."""

    mode: str = "merged"
    quant: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ModelfileView:
    """Of the stage *modelfile*: what the files cannot hold."""

    left_out: LeftOut | None = None


@dataclass(frozen=True)
class DeployView:
    """Of the stage *deploy*: the context that was served."""

    context_tokens: int = 0


@dataclass(frozen=True)
class SmokeView:
    """Of the stage *smoke*."""

    smoke: tuple[SmokeAnswer, ...] = ()
    heldout: Heldout | None = None


@dataclass(frozen=True)
class RunView:
    """Of the stages' facts those that are read after the ship."""

    data: DataView = DataView()
    train: TrainView = TrainView()
    evaluate: EvaluateView = EvaluateView()
    export: ExportView = ExportView()
    modelfile: ModelfileView = ModelfileView()
    deploy: DeployView = DeployView()
    smoke: SmokeView = SmokeView()


@dataclass(frozen=True)
class Logits:
    """How far the file's logits are from the reference's."""

    nmse: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    top1: float | None = None
    perplexity_reference: float | None = None
    perplexity_gguf: float | None = None


@dataclass(frozen=True)
class Certified:
    """Of a certificate the verdict and the figures of the file as a whole."""

    ok: bool
    verdict: str
    broken_stage: str | None = None
    logits: Logits = Logits()


@dataclass(frozen=True)
class Manifest:
    """A run's `manifest.json`; one without a name stands for a run that has none.

    `facts` are each stage's own, as it made them; `certificate` is the certificate's JSON.
    """

    schema: str = SCHEMA
    format: int = FORMAT
    name: str = ""
    written: str | None = None
    forge: str | None = None
    outcome: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_file: str | None = None
    pins: Pins = Pins()
    base: BaseMade = BaseMade()
    data: DataMade | None = None
    prompt: Prompt = Prompt()
    machine: Mapping[str, str] = field(default_factory=dict)
    artifacts: Mapping[str, ArtifactRecord] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    certificate: Mapping[str, Any] | None = None
    certificate_reason: str | None = None
    learned: Learned | None = None
    stages: tuple[StageRun, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str | None:
        """The certificate in words."""
        return str(self.certificate["verdict"]) if self.certificate else None

    def read_facts(self) -> RunView:
        """The stages' facts that are read after the ship; raises `ValueError` for others than they are."""
        return from_plain(RunView, self.facts, is_strict=False)

    def read_certificate(self) -> Certified | None:
        """The certificate's verdict and figures; raises `ValueError` for another shape than it has."""
        return from_plain(Certified, self.certificate, is_strict=False) if self.certificate else None

    def read_recipe(self) -> Recipe | None:
        """The recipe that was shipped."""
        from forge.recipe.schema import recipe_from_json  # pydantic: most readers do without

        return recipe_from_json(dict(self.recipe)) if self.recipe else None

    def with_findings(self, findings: Mapping[str, object]) -> Manifest:
        """This manifest with what a stage found in the ship: fields of this class, or others."""
        return manifest_of({**self.as_json(), **findings})

    def as_json(self) -> Mapping[str, object]:
        """What stands in the file."""
        plain = to_plain(self)
        others = plain.pop("others")
        return {**plain, **others}


def read_manifest(directory: Path) -> Manifest:
    """The run's last manifest; one without a name when there is none that can be read."""
    path = directory / MANIFEST
    try:
        content = kept_json(path)
    except (OSError, ValueError):
        return Manifest()
    try:
        return manifest_of(content)
    except ValueError as reason:
        report.warning(f"{path} is not read: {reason}")
        return Manifest()


def manifest_of(content: object) -> Manifest:
    """The manifest that `Manifest.as_json` gave; raises `ValueError` that names the field."""
    if isinstance(content, Mapping):
        known = {known_field.name for known_field in fields(Manifest)}
        content = {**content, "others": {name: content[name] for name in content if name not in known}}
    manifest = from_plain(Manifest, content, is_strict=False)
    manifest.read_facts()
    return manifest


def read_run_modelfile(directory: Path) -> Modelfile | None:
    """What the run gives Ollama: its Modelfile.jinja, and what that cannot hold; None where there is none."""
    path = directory / MODELFILE_JINJA
    if not path.is_file():
        return None
    return read_modelfile(path, read_manifest(directory).read_facts().modelfile.left_out)

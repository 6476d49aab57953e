"""The stage *modelfile*: what the GGUF is handed to Ollama with, held against the GGUF and the training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forge import report
from forge.chat.hand_over import (
    MODELFILE,
    MODELFILE_JINJA,
    WrittenModelfiles,
    hand_over,
    licences_of,
    read_modelfile,
    refuse_other_sampling,
    sampling_of,
    write_modelfiles,
)
from forge.chat.same_prompts import ComparedPrompts, compare_prompts
from forge.chat.stops import require
from forge.codec import Json
from forge.data.account import Prepared
from forge.export.run import GGUF_FILE
from forge.model.gguf_header import read_gguf
from forge.pipeline.stage import Result
from forge.resolve.derived import (
    context_tokens,
    gguf_name,
    longest_reply,
    prompt_params,
    quant_asked,
    sampling_params,
)
from forge.resolve.resolved import Resolved
from forge.resolve.stage import OfType, ShipStage
from forge.runs.files import adapter_beside, of_type, withdraw_types
from forge.stages.data import DATA_STAGE
from forge.stages.export import EXPORT_STAGE, ExportFacts, adapter_in
from forge.store.artifacts import Artifact
from forge.store.runs import publish


@dataclass(frozen=True)
class Variables:
    """Those that the template reads, and those that the recipe pins."""

    read: tuple[str, ...]
    pinned: Mapping[str, object]


@dataclass(frozen=True)
class ModelfileFacts(WrittenModelfiles):
    """The files, and of how many conversations the prompts were the same through every template."""

    same_prompts: ComparedPrompts
    variables: Variables


class ModelfileStage(OfType, ShipStage):
    """Modelfile and Modelfile.jinja, for Ollama; prompts and stops held against the GGUF's own."""

    name = "modelfile"
    rank = 80
    version = 5

    def __init__(self, ship: Resolved) -> None:
        super().__init__(ship)
        export = of_type(EXPORT_STAGE, ship.further_type)
        self.needs = (*((DATA_STAGE,) if ship.recipe.data else ()), export)

    def params(self) -> Mapping[str, Json]:
        return {
            "file": gguf_name(self.ship, quant_asked(self.ship)),
            "chat template": self.ship.template_digest,
            "base": self.ship.base_digest,
            "deploy.context_tokens": self.ship.recipe.deploy.context_tokens,
            "smoke.max_tokens": longest_reply(self.ship),
            **prompt_params(self.ship),
            **sampling_params(self.ship),
        }

    def build(self, inputs: Mapping[str, Artifact], out: Path) -> ModelfileFacts:
        header, stops = read_gguf(inputs[EXPORT_STAGE].path / GGUF_FILE), self.ship.stops
        handed = hand_over(
            self.ship.template,
            # Whether the GGUF itself writes BOS; the tokenizer's files may say otherwise.
            add_bos=header.adds_bos,
            stops=stops.texts,
            context_tokens=context_tokens(
                self.ship, inputs[DATA_STAGE].read(Prepared) if DATA_STAGE in inputs else None
            ),
            sampling=sampling_of(self.ship.base_directory, self.ship.recipe.model.sampling.asked()),
            system=self.ship.recipe.model.system,
            licences=licences_of(self.ship.base_directory),
        )
        file = gguf_name(self.ship, inputs[EXPORT_STAGE].read(ExportFacts).quant)
        adapter = adapter_beside(Path(file)).name if adapter_in(inputs[EXPORT_STAGE]) else None
        facts = write_modelfiles(out, file=file, handed=handed, adapter=adapter)
        written = {
            name: read_modelfile(out / name, facts.left_out)
            for name in (MODELFILE, MODELFILE_JINJA)
            if (out / name).exists()
        }
        broken = [problem for name, text in written.items() for problem in stops.in_modelfile(text, name)]
        require([*stops.in_gguf(header), *broken])
        refuse_other_sampling(header, self.ship.recipe.model.sampling.asked())
        same = compare_prompts(handed, header.chat_template or "", written.get(MODELFILE))
        report.info(f"{same.conversations} conversations: the same prompts through {', '.join(same.through)}")
        variables = Variables(tuple(self.ship.template.variables_read()), self.ship.template.variables)
        return ModelfileFacts(**vars(facts), same_prompts=same, variables=variables)

    def publish(self, artifact: Artifact, run: Path, published: str | None) -> None:
        for name in (MODELFILE, MODELFILE_JINJA):
            if self.ship.further_type is None:
                withdraw_types(name, run)
            target = run / of_type(name, self.ship.further_type)
            if name in artifact.outputs:
                publish(artifact.path / name, target)
            else:
                target.unlink(missing_ok=True)

    def summary(self, result: Result, run: Path) -> Mapping[str, object]:
        if self.ship.further_type:
            return {}
        facts = result.read(ModelfileFacts)
        return {
            "modelfile": str(run / MODELFILE) if facts.modelfile else None,
            "modelfile_reason": facts.reason,
        }

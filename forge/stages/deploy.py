"""The stage *deploy*: starts a server and proves its prompts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

from forge import report
from forge.chat.difference import difference_of, first_difference
from forge.chat.hand_over import MODELFILE_JINJA, read_modelfile
from forge.chat.modelfile import Modelfile
from forge.codec import from_plain
from forge.data.account import Prepared
from forge.errors import CheckError, ForgeError
from forge.export.run import GGUF_FILE
from forge.model.gguf_header import read_gguf
from forge.pipeline.stage import Action, Result
from forge.recipe.schema import Recipe
from forge.resolve.derived import context_tokens
from forge.resolve.queries import queries_in, smoke_passes
from forge.resolve.resolved import Resolved
from forge.resolve.rows import measured_file
from forge.resolve.stage import OfShip
from forge.serve.endpoint import Endpoint
from forge.serve.live import LiveProof
from forge.serve.ready import check_door
from forge.serve.runtimes import check_runtime
from forge.serve.talk import Kind, OfKind, Talk
from forge.stages.data import DATA_STAGE
from forge.stages.export import EXPORT_STAGE, ExportFacts, adapter_in
from forge.stages.modelfile import ModelfileFacts, ModelfileStage
from forge.stages.verify import VERIFY_STAGE, certificate
from forge.store.artifacts import Facts
from forge.verify.measurement import Measurement

# The rest of `serve` is imported where it is used: it loads httpx, which a plan has no use for.
DEPLOY_STAGE = "deploy"
_OWN_PROMPTS = 50
_ASKED = 8


@dataclass(frozen=True)
class DeployFacts:
    """Where the model is served, how many prompts were proved, and of each kind, and what was measured."""

    runtime: str
    endpoint: str
    model: str
    context_tokens: int
    prompts_compared: int
    live: LiveProof | None
    prompts: tuple[OfKind, ...] = ()


class DeployAction(OfShip, Action):
    """The recipe's runtime on the exported file; its prompts and ids are compared with training's."""

    name = DEPLOY_STAGE
    rank = 75
    needs = (EXPORT_STAGE,)

    def look(self) -> None:
        """Refuse a door that is open for everybody before anything is trained."""
        deploy = self.ship.recipe.deploy
        if deploy.runtime != "ollama" and not deploy.without_key:
            check_door(deploy.host, has_key=False, without_key=False)

    def require_tools(self) -> None:
        self.look()
        deploy = self.ship.recipe.deploy
        check_runtime(deploy.runtime, host=deploy.host, port=deploy.port)

    def findings(self, results: Mapping[str, Result]) -> Mapping[str, object]:
        """The certificate with the server's leg in it."""
        if VERIFY_STAGE not in results:
            return {}
        live = results[self.name].read(DeployFacts).live
        measured = results[VERIFY_STAGE].read(Measurement)
        return {"certificate": certificate(self.ship, measured, live).plain()}

    def verdict(self, facts: Facts) -> ForgeError | None:
        live = from_plain(DeployFacts, facts).live
        return live.failure() if live else None

    def act(self, results: Mapping[str, Result], stack: ExitStack) -> DeployFacts:
        from forge.serve.live_proof import prove_live
        from forge.serve.runtime import ServerSettings
        from forge.serve.runtimes import runtime_for

        deploy = self.ship.recipe.deploy
        artifact = results[EXPORT_STAGE].artifact
        assert artifact is not None
        data = results[DATA_STAGE].read(Prepared) if DATA_STAGE in results else None
        talks = _talks(self.ship.recipe, results)
        in_ollama = deploy.runtime == "ollama"
        compared: list[OfKind] = []
        settings = ServerSettings(
            model=artifact.path / GGUF_FILE,
            adapter=adapter_in(artifact),
            alias=self.ship.recipe.name,
            context_tokens=context_tokens(self.ship, data),
            host=deploy.host,
            # What is kept is started once more when all is proved, where an earlier one may serve still;
            # Ollama's port is that of a server that is there already.
            port=0 if deploy.keep and not in_ollama else deploy.port,
            parallel=deploy.parallel,
            threads=deploy.threads,
            gpu_layers=deploy.gpu_layers,
            without_key=deploy.without_key,
            modelfile=_modelfile(results),
            proof=(lambda trial: compared.extend(prove_in_ollama(self.ship, talks, trial)))
            if in_ollama
            else None,
        )
        endpoint = stack.enter_context(runtime_for(deploy.runtime)(settings, log=self.ship.log))
        live = None
        if not in_ollama:
            compared += prove_served_prompts(self.ship, endpoint, talks)
        if not in_ollama and VERIFY_STAGE in results:
            measured = results[VERIFY_STAGE].read(Measurement)
            live = prove_live(
                endpoint,
                [talk.messages for talk in talks[1 : 1 + _ASKED]],
                expected=measured.live,
                file_type=measured.file.type,
                weight_bytes=read_gguf(settings.model).weight_bytes,
                sampling=measured.file.sampling,
                context_tokens=settings.context_tokens,
                longest_tokens=data.longest_tokens if data else 0,
                is_adapted=artifact.read(ExportFacts).mode == "adapter",
            )
        return DeployFacts(
            deploy.runtime,
            endpoint.url,
            endpoint.model,
            settings.context_tokens,
            sum(kind.same for kind in compared),
            live,
            tuple(compared),
        )


def _modelfile(results: Mapping[str, Result]) -> Modelfile | None:
    artifact = results[ModelfileStage.name].artifact if ModelfileStage.name in results else None
    if artifact is None:
        return None
    return read_modelfile(artifact.path / MODELFILE_JINJA, artifact.read(ModelfileFacts).left_out)


def _talks(recipe: Recipe, results: Mapping[str, Result]) -> list[Talk]:
    """Whose prompts are compared: a greeting, the smoke queries, the user's own rows."""
    asked = [Talk(query.messages, query.tools) for query in queries_in(recipe)]
    return [Talk(({"role": "user", "content": "Hello!"},)), *asked, *_some_rows(results)]


def _some_rows(results: Mapping[str, Result]) -> list[Talk]:
    """Prompts of the user's own held-out rows, else of training rows."""
    artifact = results[DATA_STAGE].artifact if DATA_STAGE in results else None
    if artifact is None:
        return []
    with (artifact.path / measured_file(artifact)).open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in islice(stream, _OWN_PROMPTS)]
    talks = [Talk(row["messages"][:-1], row.get("tools", ())) for row in rows]
    return [talk for talk in talks if talk.messages]  # a plain text has none


def prove_served_prompts(ship: Resolved, endpoint: Endpoint, talks: Sequence[Talk]) -> list[OfKind]:
    """The server writes each prompt as training did, tools and all, in text and in ids.

    Where the GGUF adds BOS, llama-server takes it off the text and puts it back as a token. Raises
    `CheckError` with the first difference.
    """
    from forge.serve.client import Client

    form, bos = ship.prompt_format, ship.tokenizer.tokens.get("bos", "")
    proved: Counter[Kind] = Counter()
    with Client(endpoint) as client:
        for talk in talks:
            expected = talk.prompt(ship.template)
            prompt = client.apply_template(talk.messages, talk.tools)
            if expected not in (prompt, bos + prompt):
                raise _differs("prompt differs from training's at character", expected, prompt)
            if (ids := client.tokenize(prompt, add_special=True)) != (trained := form.ids(expected)):
                raise _differs("token ids differ from training's at token", trained, ids)
            proved[talk.kind] += 1
    return [OfKind(kind, count, count) for kind, count in proved.items()]


def _differs(what: str, expected: Sequence[object], served: Sequence[object]) -> CheckError:
    return CheckError(
        f"deploy: the server's {what} {first_difference(expected, served)}",
        hint="pin the template's variables with train.template_variables, or use another base",
        problems=difference_of(expected, served, "served"),
    )


def prove_in_ollama(ship: Resolved, talks: Sequence[Talk], endpoint: Endpoint) -> list[OfKind]:
    """The model that `endpoint` names writes each prompt as training did, with as many tokens, and answers.

    Its runtime has compared it with the GGUF's own template; this holds it against the tokenizer that
    trained. Raises `CheckError` with the first difference of texts, or the smoke queries that failed; how
    far prompts with tools, calls and thinking are training's it says.
    """
    from forge.serve.ollama import prove_kinds, prove_prompts, prove_stops
    from forge.tools.ollama import Ollama

    form = ship.prompt_format
    texts = [talk.messages for talk in talks if talk.kind == "text"]
    with Ollama(endpoint.url) as server:
        prove_stops(server, endpoint.model, ship.stops.texts)
        proved = prove_prompts(
            server,
            endpoint.model,
            ship.template,
            texts,
            writes_bos=None,
            count=lambda texts: [len(form.ids(text)) for text in texts],
        )
        others = [talk for talk in talks if talk.kind != "text"]
        kinds = prove_kinds(server, endpoint.model, ship.template, others)
    for kind in kinds:
        line = f"Ollama: prompts with {kind.kind}: {kind.same} of {kind.prompts} are training's"
        report.info(line) if kind.same == kind.prompts else report.warning(f"{line}: {kind.why}")
    smoke_passes(ship.recipe, endpoint)
    return [OfKind("text", proved.prompts, proved.counted), *kinds]

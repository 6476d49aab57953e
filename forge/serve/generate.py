"""Batch generation: a file of prompts to a file of answers, through any OpenAI-compatible endpoint.

Started again, it goes on where it stopped. Requests run side by side, fewer while the server is
busy; each answer is on the disk before the next is asked for in its place. A server that dies and
comes back costs time only; what can never succeed becomes a failed row.

Several endpoints share the rows: each gets as many as it has room for, and what one cannot
answer another does. Not covered: an order of the answers other than as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import signal
import threading
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from forge import report
from forge.errors import ForgeError, InterruptedByUserError, RecipeError, StageError
from forge.serve import native, wire
from forge.serve.answers import AnsweredRow, answer_of, failed_answer
from forge.serve.endpoint import Endpoint
from forge.serve.ids import Ids
from forge.serve.lanes import Lane, freest, slots_of
from forge.serve.output import AnswerFile, OutputError
from forge.serve.retries import TRIES_OF_ONE_ROW, Attempts, Outage, is_of_a_proxy, pause
from forge.serve.rows import PromptRow, PromptRows, WrongRowsError
from forge.serve.wire import (
    BusyError,
    GarbledError,
    GoneError,
    RefusedError,
    Sampling,
    UnreachableError,
)

LABEL = "generate"
# Worth another try.
FOR_NOW = (BusyError, UnreachableError, GarbledError)
_AGAIN = "run the same command again: it goes on where it stopped"
_Task = asyncio.Task[AnsweredRow | None]


@dataclass(frozen=True)
class Generated:
    """What a run did.

    `skipped`: answered before; `failed`: failed rows in the output, old and new; `cut`: answers of
    this run that their limit of tokens cut (`finish_reason` `length`); `silent`: those without any text,
    which are only thinking, a tool call, or nothing.
    """

    written: int
    skipped: int
    failed: int
    tokens_per_second: float
    cut: int = 0
    silent: int = 0


def answer_rows(
    endpoints: Endpoint | Sequence[Endpoint],
    prompts: Path,
    out: Path,
    *,
    sampling: Sampling | None = None,
    concurrency: int | None = None,
    raw: bool = False,
    retry_failed: bool = False,
    patience_seconds: float = 300.0,
) -> Generated:
    """Answer every row of `prompts` that `out` does not answer yet; see `rows` for the two files.

    `concurrency` is for each endpoint; None asks as many at once as it has slots. `raw` prompts get
    no chat template. While nothing is answered it
    keeps trying for `patience_seconds`. An endpoint that is not `proved` is asked for its models once it
    answers: its `model`, or the first where none is named, must be there, or it is left out with a warning
    while others answer.

    Raises `DataError` for wrong rows (in a file of less than some hundred thousand before anything is sent),
    `RefusedError` where every request would be refused, `StageError` when rows are left to do or `out` cannot
    be written, and `InterruptedByUserError`; whatever was answered by then is kept.
    """
    endpoints = [endpoints] if isinstance(endpoints, Endpoint) else endpoints
    with contextlib.ExitStack() as stack:
        ids = stack.enter_context(contextlib.closing(Ids()))
        rows = stack.enter_context(PromptRows(prompts, ids, raw=raw))
        output = stack.enter_context(AnswerFile(out, ids, retry_failed=retry_failed))
        work = iter(rows)
        first = next(work, None)
        lanes = [Lane(endpoint, concurrency or slots_of(endpoint)) for endpoint in endpoints] if first else []
        batch = _Batch(lanes, output, sampling or Sampling(), rows, patience_seconds)
        try:
            if first:
                asyncio.run(_until_stopped(batch.run(itertools.chain([first], work))))
        except (KeyboardInterrupt, asyncio.CancelledError) as stop:
            raise InterruptedByUserError(f"interrupted: {batch.so_far()}", hint=_AGAIN) from stop
        except (*FOR_NOW, GoneError, OutputError) as failure:
            hint = failure.hint if isinstance(failure, OutputError) else _AGAIN
            raise StageError(f"{batch.so_far()}: {failure.message}", hint=hint) from failure
        except WrongRowsError as wrong:
            message = f"{wrong.message}; {batch.written} rows written"
            raise WrongRowsError(message, hint=wrong.hint, problems=wrong.problems) from wrong
        finally:
            report.close()
        if batch.set_aside:
            raise StageError(f"{batch.so_far()}: {batch.set_aside[0]}", hint=_AGAIN)
        skipped = rows.total - batch.written - batch.failed
        speed = round(batch.tokens_per_second, 1)
        return Generated(batch.written, skipped, output.failed, speed, batch.cut, batch.silent)


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Cancel `work` on Ctrl-C and SIGTERM.

    An exception raised from a signal's handler could strike between a write and its being counted,
    or inside the event loop; a cancelled task stops where it waits.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    if threading.current_thread() is not threading.main_thread():
        return await task

    def cancel(number: int, frame: object) -> None:
        # Once: a second Ctrl-C would strike while what has come is being written.
        loop.call_soon_threadsafe(lambda: task.cancelling() or task.cancel())

    before = {number: signal.signal(number, cancel) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        await task
    finally:
        for number, action in before.items():
            signal.signal(number, action)


class _Batch:
    """One run over the rows that are left."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        output: AnswerFile,
        sampling: Sampling,
        rows: PromptRows,
        patience_seconds: float,
    ) -> None:
        self.lanes = list(lanes)
        self.output = output
        self.sampling = sampling
        self.rows = rows
        # Rows that are to be asked again, by the number of rows that are to be asked before.
        self._again: list[tuple[int, int, Attempts]] = []
        self._started = 0
        self._models: set[str] = set()
        self.written = 0
        self.failed = 0
        self.cut = 0
        self.silent = 0
        self._total = 0
        self.set_aside: list[str] = []
        self._outage = Outage(patience_seconds)
        self._tokens = 0
        self._begin = time.monotonic()

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(time.monotonic() - self._begin, 1e-9)

    def so_far(self) -> str:
        finished = self.written + self.failed
        if not self.rows.whole:
            return f"{self.written} rows written, the rest left to do"
        left = self.output.ids.left()
        return f"{self.written} of {finished + left} rows written, {left} left to do"

    async def run(self, rows: Iterator[PromptRow]) -> None:
        """Keep as many requests running as the pace allows; write all that has come at once."""
        running: set[_Task] = set()
        async with contextlib.AsyncExitStack() as stack:
            self._clients = {lane: await stack.enter_async_context(_client(lane)) for lane in self.lanes}
            checking = asyncio.create_task(self._check_ahead())
            try:
                while True:
                    free = max(0, sum(int(lane.pace) for lane in self.lanes) - len(running))
                    running |= {asyncio.create_task(self._answer(asked)) for asked in self._next(rows, free)}
                    if not running:
                        return
                    looked_at = running if checking.done() else running | {checking}
                    done, _ = await asyncio.wait(looked_at, return_when=asyncio.FIRST_COMPLETED)
                    running -= done
                    self._write(done)
            finally:
                for task in (*running, checking):
                    task.cancel()
                await asyncio.gather(*running, checking, return_exceptions=True)
                if not self.output.broken:
                    # What came in while it was being stopped.
                    self._write({task for task in running if not task.cancelled() and not task.exception()})

    async def _check_ahead(self) -> None:
        while not self.rows.whole:
            self.rows.check_some()
            await asyncio.sleep(0)

    def _next(self, rows: Iterator[PromptRow], most: int) -> Iterator[Attempts]:
        """The rows to ask now, at most so many: those whose turn has come again, then new ones."""
        for _ in range(most):
            due = bool(self._again) and self._again[0][0] <= self._started
            row = None if due else next(rows, None)
            if row is None and not self._again:
                return
            self._started += 1
            yield heapq.heappop(self._again)[2] if row is None else Attempts(row)

    def _write(self, done: set[_Task]) -> None:
        """Write the answers of finished tasks; then raise what one of them raised."""
        answers = [answer for task in done if not task.exception() and (answer := task.result())]
        if answers:
            self.output.append(answers)
            self.written += sum(answer.succeeded for answer in answers)
            self.failed += sum(not answer.succeeded for answer in answers)
            self.cut += sum(answer.cut for answer in answers)
            self.silent += sum(answer.silent for answer in answers)
            finished = self.written + self.failed
            if self.rows.whole and not self._total:
                self._total = finished + self.output.ids.left()
            # Until all rows were seen nobody knows how many there are.
            total = self._total or max(self.rows.total, finished + 1)
            report.advance(LABEL, finished, total, f"{self.tokens_per_second:.0f} tokens/s")
        for task in done:
            if error := task.exception():
                raise error

    async def _answer(self, asked: Attempts) -> AnsweredRow | None:
        """The output's row, after as many tries as it takes; None when it is set aside or waits again."""
        row = asked.row
        while True:
            lane = freest(self.lanes)
            try:
                answer = await self._ask(lane, row)
            except (RecipeError, RefusedError) as refusal:
                if self._leave_out(lane, refusal):
                    continue
                if not isinstance(refusal, RefusedError) or not refusal.about_the_request:
                    raise
                self._outage.answered()
                return failed_answer(row, refusal)
            except FOR_NOW as failure:
                asked.failed(lane, failure)
                if asked.errors == TRIES_OF_ONE_ROW:
                    self.set_aside.append(f"{row.id!r}: {failure.message}")
                    return None
                # What another lane works on may still be answered, however long its first answers take.
                others_work = any(other.running for other in self.lanes if other is not lane)
                if self._outage.is_over_patience() and not others_work:
                    raise
                if self._outage.is_worth_a_word():
                    patience = self._outage.patience_seconds
                    report.warning(f"{failure.message}: trying again for up to {patience:.0f} s")
                lane.busy()
                await asyncio.sleep(pause(asked.tries, failure))
                if is_of_a_proxy(failure):
                    self._wait_again(asked)
                    return None
            else:
                self._tokens += answer.reply.completion_tokens
                return answer

    def _wait_again(self, asked: Attempts) -> None:
        """Let others go first, more of them each time, so that rows that are never answered stop nobody."""
        heapq.heappush(self._again, (self._started + 4 ** min(asked.tries, 20), id(asked), asked))

    def _leave_out(self, lane: Lane, refusal: ForgeError) -> bool:
        """Go on without a lane that came late and was found to be of no use, if another is left."""
        if lane.endpoint.proved:
            return False
        if lane in self.lanes and len(self.lanes) > 1:
            self.lanes.remove(lane)
            report.warning(f"{refusal.message}: it is left out")
        return lane not in self.lanes

    async def _ask(self, lane: Lane, row: PromptRow) -> AnsweredRow:
        client = self._clients[lane]
        with lane.used(), wire.failures_of(lane.endpoint):
            if not lane.endpoint.proved:
                lane.endpoint = await _proved(lane.endpoint, client)
            endpoint = lane.endpoint
            if endpoint.is_ollama:
                await _require_whole(row, endpoint, client)
            path, body = self._request(row, endpoint)
            response = await client.post(endpoint.route(path), json=body)
        payload = wire.read_object(endpoint, response)
        answer = answer_of(row, _reply(endpoint, path, payload), payload)
        lane.answered()
        self._outage.answered()
        return answer

    def _request(self, row: PromptRow, endpoint: Endpoint) -> tuple[str, dict[str, object]]:
        """The route and the body; Ollama's own route for what its OpenAI-compatible ones drop."""
        body: dict[str, object]
        if row.body is not None:
            self._report_model(row, endpoint)
            path, body = row.path, {**row.body, "model": endpoint.model}
        elif row.messages:
            texts = native.plain_texts(row.messages) if endpoint.is_ollama else None
            if texts is not None:
                return native.CHAT, native.chat_request(endpoint, texts, self.sampling)
            path, body = wire.CHAT, wire.chat_request(endpoint, row.messages, self.sampling)
        elif endpoint.is_ollama:
            return native.GENERATE, native.completion_request(endpoint, row.raw, self.sampling)
        else:
            path, body = wire.COMPLETION, wire.completion_request(endpoint, row.raw, self.sampling)
        if endpoint.is_ollama:
            native.refuse_ignored(path, body)
        return path, body

    def _report_model(self, row: PromptRow, endpoint: Endpoint) -> None:
        """A batch that was written for another service names its model: that is not the one that is asked."""
        named = (row.body or {}).get("model")
        if named and named != endpoint.model and str(named) not in self._models and len(self._models) < 5:
            self._models.add(str(named))
            report.warning(f"rows name the model {named}; {endpoint.model} is asked")


async def _proved(endpoint: Endpoint, client: httpx.AsyncClient) -> Endpoint:
    """With its model as the server lists it, the first where none is named."""
    response = await client.get(endpoint.route(wire.MODELS))
    names = wire.read_models(endpoint, wire.read_object(endpoint, response))
    if not names:
        raise GarbledError(f"{endpoint.url} serves no model yet")
    model = wire.choose_model(endpoint.url, names, endpoint.model)
    return replace(endpoint, model=model, proved=True, is_ollama=await _is_ollama(endpoint, client))


async def _is_ollama(endpoint: Endpoint, client: httpx.AsyncClient) -> bool:
    """As `Client.is_ollama`."""
    version = await client.get(endpoint.route(native.VERSION))
    if not version.is_success or not native.names_version(wire.parse_answer(version.content)):
        return False
    return native.greets((await client.get(endpoint.route(native.ROOT))).content)


async def _require_whole(row: PromptRow, endpoint: Endpoint, client: httpx.AsyncClient) -> None:
    """Raise `RefusedError` where Ollama would leave out the oldest turns of the row's conversation."""
    texts = native.plain_texts(row.messages or (row.body or {}).get("messages"))
    if texts and (body := native.render_request(endpoint, texts)):
        response = await client.post(endpoint.route(native.CHAT), json=body)
        rendered = wire.read_object(endpoint, response)
        with wire.as_expected(endpoint, "prompt"):
            native.require_whole(texts, rendered)


def _reply(endpoint: Endpoint, path: str, payload: Mapping[str, Any]) -> wire.Reply | None:
    is_native = path in (native.CHAT, native.GENERATE)
    return native.read_reply(endpoint, payload) if is_native else wire.read_answer(endpoint, path, payload)


def _client(lane: Lane) -> httpx.AsyncClient:
    # A lane may get more than its most for a while, when another is away.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=lane.most)
    return httpx.AsyncClient(**wire.connection_options(lane.endpoint), limits=limits)

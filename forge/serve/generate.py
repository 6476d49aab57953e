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
import signal
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from forge import report
from forge.errors import ForgeError, InterruptedByUserError, RecipeError, StageError
from forge.serve import wire
from forge.serve.endpoint import Endpoint
from forge.serve.lanes import Lane, freest, slots_of
from forge.serve.retries import TRIES_OF_ONE_ROW, Asked, Outage, is_of_a_proxy, pause
from forge.serve.rows import Output, Row, read_rows
from forge.serve.wire import (
    BusyError,
    GarbledError,
    GoneError,
    RefusedError,
    Reply,
    Sampling,
    UnreachableError,
)

LABEL = "generate"
# Worth another try.
FOR_NOW = (BusyError, UnreachableError, GarbledError)
_AGAIN = "run the same command again: it goes on where it stopped"
_Task = asyncio.Task[dict[str, Any] | None]


@dataclass(frozen=True)
class Generated:
    """What a run did.

    `skipped`: answered before; `failed`: failed rows in the output, old and new; `cut`: answers of
    this run that their limit of tokens cut (`finish_reason` `length`).
    """

    written: int
    skipped: int
    failed: int
    tokens_per_second: float
    cut: int = 0


def generate(
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
    while others answer. Raises `DataError` for wrong rows before anything is sent,
    `RefusedError` where every request would be refused, `StageError` when rows are left to do, and
    `InterruptedByUserError`; whatever was answered by then is kept.
    """
    endpoints = [endpoints] if isinstance(endpoints, Endpoint) else endpoints
    rows = read_rows(prompts, raw=raw)
    with Output(out, retry_failed=retry_failed) as output:
        todo = [row for row in rows if row.id not in output.done]
        skipped = len(rows) - len(todo)
        lanes = [Lane(one, concurrency or slots_of(one)) for one in endpoints] if todo else []
        batch = _Batch(lanes, output, sampling or Sampling(), todo, patience_seconds)
        try:
            if todo:
                asyncio.run(_until_stopped(batch.run()))
        except (KeyboardInterrupt, asyncio.CancelledError) as stop:
            raise InterruptedByUserError(f"interrupted: {batch.so_far()}", hint=_AGAIN) from stop
        except (*FOR_NOW, GoneError) as failure:
            raise StageError(f"{batch.so_far()}: {failure.message}", hint=_AGAIN) from failure
        finally:
            report.close()
        if batch.set_aside:
            raise StageError(f"{batch.so_far()}: {batch.set_aside[0]}", hint=_AGAIN)
        failed = sum(not succeeded for succeeded in output.done.values())
        return Generated(batch.written, skipped, failed, round(batch.tokens_per_second, 1), batch.cut)


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Cancel `work` on Ctrl-C and SIGTERM.

    An exception raised from a signal's handler could strike between a write and its being counted,
    or inside the event loop; a cancelled task stops where it waits.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    if threading.current_thread() is not threading.main_thread():
        return await task

    def cancel(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(task.cancel)

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
        output: Output,
        sampling: Sampling,
        rows: Sequence[Row],
        patience_seconds: float,
    ) -> None:
        self.lanes = list(lanes)
        self.output = output
        self.sampling = sampling
        self.rows = rows
        self._waiting = deque(map(Asked, rows))
        self.written = 0
        self.failed = 0
        self.cut = 0
        self.set_aside: list[str] = []
        self._outage = Outage(patience_seconds)
        self._tokens = 0
        self._begin = time.monotonic()

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / max(time.monotonic() - self._begin, 1e-9)

    def so_far(self) -> str:
        left = len(self.rows) - self.written - self.failed
        return f"{self.written} of {len(self.rows)} rows written, {left} left to do"

    async def run(self) -> None:
        """Keep as many requests running as the pace allows; write all that has come at once."""
        running: set[_Task] = set()
        async with contextlib.AsyncExitStack() as stack:
            self._clients = {lane: await stack.enter_async_context(_client(lane)) for lane in self.lanes}
            try:
                while True:
                    free = max(0, sum(int(lane.pace) for lane in self.lanes) - len(running))
                    next_ones = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
                    running |= {asyncio.create_task(self._answer(one)) for one in next_ones}
                    if not running:
                        return
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    self._write(done)
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                # What came in while it was being stopped.
                self._write({task for task in running if not task.cancelled() and not task.exception()})

    def _write(self, done: set[_Task]) -> None:
        """Write the answers of finished tasks; then raise what one of them raised."""
        answers = [answer for task in done if not task.exception() and (answer := task.result())]
        if answers:
            self.output.append(answers)
        for answer in answers:
            succeeded = "text" in answer
            self.output.done[answer["id"]] = succeeded
            self.written += succeeded
            self.failed += not succeeded
            self.cut += answer.get("finish_reason") == "length"
        if answers:
            finished = self.written + self.failed
            report.advance(LABEL, finished, len(self.rows), f"{self.tokens_per_second:.0f} tokens/s")
        for task in done:
            if error := task.exception():
                raise error

    async def _answer(self, asked: Asked) -> dict[str, Any] | None:
        """The output's row, after as many tries as it takes; None when it is set aside or waits again."""
        row = asked.row
        while True:
            lane = freest(self.lanes)
            try:
                reply = await self._ask(lane, row)
            except (RecipeError, RefusedError) as refusal:
                if self._leave_out(lane, refusal):
                    continue
                if not isinstance(refusal, RefusedError) or not refusal.about_the_request:
                    raise
                self._outage.answered()
                return {"id": row.id, "error": refusal.message}
            except FOR_NOW as failure:
                asked.failed(lane, failure)
                if asked.errors == TRIES_OF_ONE_ROW:
                    self.set_aside.append(f"{row.id!r}: {failure.message}")
                    return None
                # What another lane works on may still be answered, however long its first answers take.
                others_work = any(other.running for other in self.lanes if other is not lane)
                if self._outage.is_over_patience() and not others_work:
                    raise
                lane.busy()
                await asyncio.sleep(pause(asked.tries, failure))
                if is_of_a_proxy(failure):
                    self._wait_again(asked)
                    return None
            else:
                self._tokens += reply.completion_tokens
                return _output_row(row, reply)

    def _wait_again(self, asked: Asked) -> None:
        """Let others go first, more of them each time, so that rows that are never answered stop nobody."""
        self._waiting.insert(min(4**asked.tries, len(self._waiting)), asked)

    def _leave_out(self, lane: Lane, refusal: ForgeError) -> bool:
        """Go on without a lane that came late and was found to be of no use, if another is left."""
        if lane.endpoint.proved:
            return False
        if lane in self.lanes and len(self.lanes) > 1:
            self.lanes.remove(lane)
            report.warning(f"{refusal.message}: it is left out")
        return lane not in self.lanes

    async def _ask(self, lane: Lane, row: Row) -> Reply:
        client = self._clients[lane]
        with lane.used(), wire.failures_of(lane.endpoint):
            if not lane.endpoint.proved:
                lane.endpoint = await _proved(lane.endpoint, client)
            endpoint = lane.endpoint
            if row.messages:
                path, body = wire.CHAT, wire.chat_request(endpoint, row.messages, self.sampling)
            else:
                path, body = wire.COMPLETION, wire.completion_request(endpoint, row.raw, self.sampling)
            response = await client.post(endpoint.route(path), json=body)
        reply = wire.read_reply(endpoint, wire.read_json(endpoint, response))
        lane.answered()
        self._outage.answered()
        return reply


async def _proved(endpoint: Endpoint, client: httpx.AsyncClient) -> Endpoint:
    """With its model as the server lists it, the first where none is named."""
    response = await client.get(endpoint.route(wire.MODELS))
    names = wire.read_models(endpoint, wire.read_json(endpoint, response))
    if not names:
        raise GarbledError(f"{endpoint.url} serves no model yet")
    return replace(endpoint, model=wire.choose_model(endpoint.url, names, endpoint.model), proved=True)


def _client(lane: Lane) -> httpx.AsyncClient:
    # A lane may get more than its most for a while, when another is away.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=lane.most)
    return httpx.AsyncClient(**wire.connection_options(lane.endpoint), limits=limits)


def _output_row(row: Row, reply: Reply) -> dict[str, Any]:
    usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
    return {"id": row.id, "text": reply.text, "finish_reason": reply.finish_reason, "usage": usage}

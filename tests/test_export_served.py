"""The real server, on exported files of real vocabularies, writes the prompts that training wrote."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forge import worker
from forge.chat.template import ChatTemplate, Message
from forge.errors import CheckError
from forge.export.run import export_gguf as make_gguf
from forge.model.tokenizer_files import read_tokenizer
from forge.resolve.resolved import Resolved
from forge.serve.embedded import serve_embedded
from forge.serve.runtime import ServerSettings
from forge.serve.talk import Talk
from forge.stages.deploy import prove_served_prompts
from tests.exporting import export_request
from tests.models import make_model
from tests.test_data_tokens import format_of
from tests.vocabularies import converters, trl_template

pytestmark = [
    pytest.mark.training,
    pytest.mark.programs,
    pytest.mark.network,
    pytest.mark.timeout(1500),
]

CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "There is bacon in this sandwich."}],
    [
        {"role": "system", "content": "Speak like Yoda."},
        {"role": "user", "content": "  Ünïcode\nand 1234 {{ x }}"},
    ],
    [{"role": role, "content": f"{role} says: Hmm!\n\n"} for role in ("user", "assistant", "user")],
]


@pytest.mark.parametrize(
    ("architecture", "vocabulary", "template"),
    [
        pytest.param("phi3", "phi-3", None, marks=pytest.mark.slow),
        ("llama", "llama-spm", None),
        # Llama 3.2 writes the day into its prompt; its own server would write today's.
        pytest.param("llama", "llama-bpe", "llama3_2", marks=pytest.mark.slow),
        pytest.param("qwen2", "qwen2", None, marks=pytest.mark.slow),
    ],
)
def test_the_server_writes_the_prompts_of_training(
    architecture: str, vocabulary: str, template: str | None, tmp_path: Path
) -> None:
    """Pitfalls 30, 48 and 49; silent wrongs 1, 3, 13 and 17."""
    text = trl_template(template) if template else None
    base = make_model(tmp_path / "base", architecture, vocabulary, template=text)
    files = read_tokenizer(base)
    tokens = files.template_tokens
    chat = ChatTemplate(files.chat_template or "", tokens)
    arguments: dict[str, Any] = {
        "base": str(base), "adapter": None, "tokenizer": str(base), "chat_template": chat.pinned_source(),
        "data": None, "out": str(tmp_path / "out"), "converters": str(converters()),
        "settings": {"name": "yoda", "quant": "f16", "keep_merged": False, "threads": 1},
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    worker.perform(make_gguf, export_request(**arguments), log=tmp_path / "log.txt")
    trained = SimpleNamespace(template=chat, prompt_format=format_of(base), tokenizer=files)
    ship = cast(Resolved, trained)
    settings = ServerSettings(tmp_path / "out" / "model.gguf", "yoda", 512, parallel=1, threads=1)
    with serve_embedded(settings, log=tmp_path / "server.txt") as endpoint:
        talks = [Talk(messages) for messages in CONVERSATIONS]
        assert sum(of_kind.same for of_kind in prove_served_prompts(ship, endpoint, talks)) == len(talks)
        right = trained.prompt_format
        trained.prompt_format = SimpleNamespace(ids=lambda text: [*right.ids(text)[:4], 7, 8, 9])
        with pytest.raises(CheckError, match="the server's token ids differ from training's at token 4"):
            prove_served_prompts(ship, endpoint, talks)
        other = ChatTemplate(chat.source + "!", tokens)
        trained.template = other
        with pytest.raises(CheckError, match="the server's prompt differs from training's at character"):
            prove_served_prompts(ship, endpoint, talks)

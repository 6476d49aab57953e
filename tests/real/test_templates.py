"""The hub's own tokenizers and chat templates: one prompt and one set of stops wherever a model is read.

Training's template, the GGUF's Jinja, the Modelfile's TEMPLATE and llama.cpp's tokens, as in a ship. The GGUF
holds the whole vocabulary and no weights, of which neither prompts nor stops hang.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.chat.hand_over import MODELFILE, MODELFILE_JINJA, hand_over, read_modelfile, write_modelfiles
from forge.chat.probe import conversations, literals
from forge.chat.same_prompts import compare_prompts
from forge.chat.stops import StopContract, require
from forge.data.prompt_format import prompt_format
from forge.export import pretokenizer
from forge.export.describe import describe
from forge.export.upstream import Choices
from forge.model.gguf_header import read_gguf
from forge.model.tokenizer_files import open_tokenizer, read_tokenizer
from forge.verify.vocabulary import check_vocabulary
from tests.test_export_proof import directory_of, template_of
from tests.vocabularies import converters
from tests.vocabulary_gguf import vocabulary_gguf

pytestmark = [pytest.mark.slow, pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(300)]
END_OF_TURN = {
    "qwen3": "<|im_end|>", "llama-3.1": "<|eot_id|>", "llama-2": "</s>",
    "deepseek-v3": "<｜end▁of▁sentence｜>", "gpt-oss": "<|return|>", "gemma-3": "<end_of_turn>",
}  # fmt: skip
_LARGE = ("gpt-oss", "gemma-3")


@pytest.mark.parametrize(
    "vocabulary",
    [pytest.param(name, marks=pytest.mark.campaign) if name in _LARGE else name for name in END_OF_TURN],
)
def test_prompt_and_stops_are_training_s_everywhere(vocabulary: str, tmp_path: Path) -> None:
    """N5, J: 200 conversations through every template; every special token of the file; every stop."""
    base, description = directory_of(tmp_path / "base", vocabulary), tmp_path / "description"
    description.mkdir()
    files, trained = read_tokenizer(base), template_of(base)
    tokenizer = open_tokenizer(base)
    end = prompt_format(trained, tokenizer, files.eos_ids).end_of_turn_id
    stops = StopContract(
        str(tokenizer.id_to_token(end)),
        {str(tokenizer.id_to_token(eos)): eos for eos in (end, *files.eos_ids)},
    )
    describe(base, base, trained.pinned_source(), description)
    stated, bos = pretokenizer.read_stated(description), files.tokens.get("bos")
    start = trained.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
    choices = Choices(
        pretokenizer.pretokenizer_of(stated), bool(bos and start.startswith(bos)),
        pretokenizer.space_prefix(stated), end,
    )  # fmt: skip
    file = vocabulary_gguf(converters(), description, tmp_path / "model.gguf", choices, "yoda")
    header = read_gguf(file)
    handed = hand_over(trained, add_bos=header.adds_bos, stops=stops.texts, context_tokens=4096)
    facts = write_modelfiles(tmp_path, file=file.name, handed=handed)
    assert (facts.status, facts.stops) == ("exact-with-limits", (END_OF_TURN[vocabulary],))
    written = {
        name: read_modelfile(tmp_path / name, facts.left_out)
        for name in (MODELFILE, MODELFILE_JINJA)
        if (tmp_path / name).is_file()
    }
    assert compare_prompts(handed, header.chat_template or "", written.get(MODELFILE)).conversations == 200
    broken = [problem for name, text in written.items() for problem in stops.in_modelfile(text, name)]
    require([*stops.in_gguf(header), *broken])
    talks = list(conversations(literals(trained), has_system=True))[:40]
    checked = check_vocabulary(file, base, trained, talks, end)
    assert (checked.tokens.ok, checked.prompt.ok, checked.stops.ok) == (True, True, True), checked
    assert checked.prompt.compared > 30

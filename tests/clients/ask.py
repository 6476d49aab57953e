"""`ask.py LIBRARY URL KEY MODEL TOKENIZER`: asks a server as people do with it, and prints what came as JSON.

Runs in the environment of `requirements.txt` (`make clients`), which has nothing of forge.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


class Weather(BaseModel):
    """The weather in a city."""

    city: str


def ask_instructor(url: str, key: str, model: str) -> dict[str, object]:
    """Instructor's default mode: a tool that must be called."""
    import instructor
    import openai

    client = instructor.from_openai(openai.OpenAI(base_url=f"{url}/v1", api_key=key))
    made = client.chat.completions.create(
        model=model, response_model=Weather, messages=ASKED, max_tokens=64, temperature=0, max_retries=0
    )
    return {"city": made.city}


def ask_langchain(url: str, key: str, model: str) -> dict[str, object]:
    """Chat, stream, function calling, a JSON schema, embeddings."""
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    chat = ChatOpenAI(model=model, base_url=f"{url}/v1", api_key=key, max_tokens=64, temperature=0)
    embed = OpenAIEmbeddings(model=model, base_url=f"{url}/v1", api_key=key, check_embedding_ctx_length=False)
    by_tool = chat.with_structured_output(Weather, method="function_calling").invoke(ASKED)
    by_schema = chat.with_structured_output(Weather, method="json_schema").invoke(ASKED)
    return {
        "city": by_tool.city,
        "by_schema": by_schema.city,
        "text": chat.invoke(ASKED).content,
        "streamed": "".join(str(piece.content) for piece in chat.stream(ASKED)),
        "embedding": len(embed.embed_query("hello")),
    }


def ask_litellm(url: str, key: str, model: str) -> dict[str, object]:
    """Chat and stream through its OpenAI provider."""
    import litellm

    asked: dict[str, Any] = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": key}
    asked |= {"messages": ASKED, "max_tokens": 16, "temperature": 0}
    pieces = [piece.choices[0].delta.content or "" for piece in litellm.completion(**asked, stream=True)]
    whole = litellm.completion(**asked)
    return {"text": whole.choices[0].message.content, "streamed": "".join(pieces)}


def ask_anthropic(url: str, key: str, model: str) -> dict[str, object]:
    """Anthropic's messages, as Claude Code asks."""
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0)
    asked: dict[str, Any] = {"model": model, "max_tokens": 16, "messages": ASKED}
    with client.messages.stream(**asked) as stream:
        streamed = "".join(stream.text_stream)
    tokens = client.messages.count_tokens(model=model, messages=ASKED).input_tokens
    return {"text": client.messages.create(**asked).content[0].text, "streamed": streamed, "tokens": tokens}


def ask_llm(url: str, key: str, model: str) -> dict[str, object]:
    """The command `llm`, with the file that docs/serving.md shows: a stream, and a schema."""
    known = {"model_id": "mine", "model_name": model, "api_base": f"{url}/v1", "api_key_name": "mine"}
    with tempfile.TemporaryDirectory() as directory:
        models = Path(directory, "extra-openai-models.yaml")
        models.write_text(json.dumps([{**known, "supports_schema": True}]))
        environment = os.environ | {"LLM_USER_PATH": directory}

        def run(*arguments: str) -> str:
            command = [sys.executable, "-m", "llm", *arguments]
            # It reads a prompt from standard input, too, unless that is a terminal.
            done = subprocess.run(
                command,
                env=environment,
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
            )
            return done.stdout

        run("keys", "set", "mine", "--value", key)
        question, short = (
            ASKED[0]["content"],
            ("-m", "mine", "-o", "max_tokens", "32", "-o", "temperature", "0"),
        )
        by_schema = run(*short, "--no-stream", "--schema", "city str", "What is the capital of France?")
        return {
            "streamed": run(*short, question).strip(),
            "by_schema": json.loads(by_schema)["city"].strip(" ,."),
        }


def ask_lm_eval(url: str, key: str, model: str) -> dict[str, object]:
    """lm-eval's multiple choice: log-probabilities of each choice after its question."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    os.environ |= {"OPENAI_API_KEY": key, "HF_HUB_OFFLINE": "1"}
    answers = {"France": "Paris", "Germany": "Berlin"}
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory, "rows.jsonl")
        texts = [
            {"question": f"The capital of {country} is", "choices": [*answers.values()], "answer": number}
            for number, country in enumerate(answers)
        ]
        rows.write_text("".join(json.dumps(text) + "\n" for text in texts))
        task = {
            "task": "capitals",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": directory},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc"}],
        }
        served = {"model": model, "base_url": f"{url}/v1/completions", "tokenizer": sys.argv[5]}
        results = lm_eval.simple_evaluate(
            model="local-completions", model_args=served, tasks=[task], task_manager=TaskManager()
        )
    return {"accuracy": results["results"]["capitals"]["acc,none"]}


LIBRARIES: Mapping[str, Callable[[str, str, str], dict[str, object]]] = {
    "instructor": ask_instructor,
    "langchain": ask_langchain,
    "litellm": ask_litellm,
    "anthropic": ask_anthropic,
    "llm": ask_llm,
    "lm_eval": ask_lm_eval,
}

if __name__ == "__main__":
    os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
    library, *arguments = sys.argv[1:5]
    sys.stdout.write("\n" + json.dumps(LIBRARIES[library](*arguments)) + "\n")

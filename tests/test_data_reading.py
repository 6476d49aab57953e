"""Several sources with formats and weights of their own, readers of one's own, and hub data with slices."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from forge import report
from forge.chat.template import ChatTemplate
from forge.data.conversation import Conversation, Place, Turn
from forge.data.files import read_file
from forge.data.prepare import Settings, prepare, read_all
from forge.data.prompt_format import prompt_format
from forge.data.reading import Source, reader_named
from forge.data.split import weighted
from forge.errors import DataError
from forge.recipe.load import load
from forge.resolve.sources import data_sources
from tests.hub_stand_in import Hub, StandInRepository
from tests.makers.tokenizer import CHATML
from tests.told_sink import Told
from tests.vocabularies import home_made_tokenizer

RECIPE = "name: a\nbase: builtin:tiny\ndata:\n"


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def exchange(text: str) -> dict[str, str]:
    return {"prompt": text, "completion": text.upper()}


def sources_of(directory: Path, data: str, *, fetch: bool = False) -> tuple[Source, ...]:
    (directory / "recipe.yaml").write_text(RECIPE + data, encoding="utf-8")
    return data_sources(load(directory / "recipe.yaml"), offline=False, fetch=fetch)[0]


def asked(sources: tuple[Source, ...], heldout: float = 0) -> list[str]:
    return [one.turns[0].content for one in read_all(Settings(sources, heldout)).training]


def test_several_sources(tmp_path: Path) -> None:
    """Each with its own format, columns, slice and weight; what it leaves unset is as `data` has it."""
    (tmp_path / "a.jsonl").write_bytes(lines(*(exchange(f"a{n}") for n in range(4))))
    (tmp_path / "b.csv").write_text("q;r\nb0;x\nb1;x\n", encoding="utf-8")
    data = (
        "  columns: {system: none}\n"
        "  source:\n"
        "    - {source: a.jsonl, split: 'train[:50%]', columns: {prompt: prompt}}\n"
        "    - {source: b.csv, columns: {prompt: q, completion: r}, weight: 2}\n"
    )
    sources = sources_of(tmp_path, data)
    assert asked(sources) == ["a0", "a1", "b0", "b0", "b1", "b1"]
    reads = [one.line for one in read_all(Settings(sources, 0)).reads]
    assert reads == [
        "a.jsonl (JSON lines): 2 rows, prompt (prompt, completion)",
        "b.csv (a table with semicolons): 2 rows, prompt (q as prompt, r as completion)",
    ]


def test_held_out_rows_have_no_weight(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*(exchange(f"a{n}") for n in range(10))))
    rows = read_all(Settings(sources_of(tmp_path, "  source: [{source: a.jsonl, weight: 3}]\n"), 2))
    assert (len(rows.training), len(rows.heldout)) == (24, 2)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ignore", "[idd]", "data.ignore: no row has a column 'idd'; did you mean ID?"),
        ("ignore", "[topic]", "data.ignore: no row has a column 'topic'"),
        (
            "roles",
            "{kunde: user, kundin: user}",
            "data.roles: nobody speaks under the name 'kundin'; did you mean Kunde?",
        ),
        (
            "columns",
            "{history: ID}",
            "data.columns.history: rows of the format sharegpt have no history",
        ),
    ],
)
def test_a_setting_that_names_what_no_row_has(field: str, value: str, message: str, tmp_path: Path) -> None:
    """Pitfall 51: a name that is misspelt changes nothing, and nobody would know."""
    turns = [{"from": "Kunde", "value": "q"}, {"from": "gpt", "value": "a"}]
    (tmp_path / "a.jsonl").write_bytes(lines({"ID": 1, "conversations": turns}))
    (tmp_path / "b.jsonl").write_bytes(lines({"conversations": turns}))

    def settings(source: str, **more: str) -> Settings:
        fields = {"source": source, "roles": "{kunde: user}", "ignore": "[Id]", **more}
        text = "".join(f"  {name}: {written}\n" for name, written in fields.items())
        return Settings(sources_of(tmp_path, text), 0)

    for make in (read_all, prepared_of):
        make(settings("[a.jsonl, b.jsonl]"))
        with pytest.raises(DataError) as caught:
            make(settings("a.jsonl", **{"ignore": "[]", field: value}))
        assert caught.value.message == message


def prepared_of(settings: Settings) -> object:
    form = prompt_format(ChatTemplate(CHATML), Tokenizer.from_str(json.dumps(home_made_tokenizer())))
    return prepare(settings, form, None, settings.sources[0].files[0].parent)


def test_a_weight_that_is_no_whole_number() -> None:
    rows = [
        Conversation((Turn("user", f"{n}"), Turn("assistant", "x")), Place("rows", n), weight=1.5)
        for n in range(400)
    ]
    drawn = weighted(rows, 42)
    assert set(drawn) == set(rows)
    assert 560 < len(drawn) < 640
    assert drawn == weighted(rows, 42) != weighted(rows, 43)


def test_an_unset_list_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    from forge.errors import RecipeError

    for data, message in {
        "  source: []\n": "the list is empty",
        "  source: a.jsonl\n  format: excel\n": "module:function",
        "  source: [{source: a.jsonl, weight: 0}]\n": "greater than 0",
    }.items():
        with pytest.raises(RecipeError) as caught:
            sources_of(tmp_path, data)
        assert any(message in str(problem) for problem in caught.value.problems), caught.value.problems


def test_a_reader_beside_the_recipe(tmp_path: Path) -> None:
    """E4: `data.format: module:function`."""
    (tmp_path / "own_rows.py").write_text(
        "def pairs(row):\n    return {'prompt': row['ask'], 'completion': row['tell']}\n", encoding="utf-8"
    )
    (tmp_path / "a.jsonl").write_bytes(lines({"ask": "Hi", "tell": "Hello."}))
    sources = sources_of(tmp_path, "  source: a.jsonl\n  format: own_rows:pairs\n")
    assert asked(sources) == ["Hi"]
    (tmp_path / "a.jsonl").write_bytes(lines({"ask": "Hi"}))
    with pytest.raises(DataError) as caught:
        asked(sources)
    assert (
        str(caught.value.problems[0])
        == "a.jsonl:1: data.format: own_rows:pairs fails on a row: KeyError: 'tell'"
    )
    for name, message in {
        "absent_rows:f": "cannot be imported",
        "own_rows:absent": "has no function 'absent'",
    }.items():
        with pytest.raises(DataError, match=message):
            reader_named(name, tmp_path)


@pytest.mark.network
def test_hub_data_with_a_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E9: files of the split by their names, packed ones too, and a slice of them."""
    import gzip

    import huggingface_hub

    files = {
        "data/train-00000-of-00002.jsonl": lines(*(exchange(f"a{n}") for n in range(5))),
        "data/train-00001-of-00002.jsonl.gz": gzip.compress(lines(*(exchange(f"b{n}") for n in range(5)))),
        "data/test-00000-of-00001.jsonl": lines(exchange("t")),
        "README.md": b"# Rows",
    }
    with Hub({"datasets/org/rows": StandInRepository(files)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)  # --offline of another test sets it
        sources = sources_of(
            tmp_path, "  source: org/rows\n  split: train[40%:60%]\n  eval: test\n", fetch=True
        )
        _, heldout = data_sources(load(tmp_path / "recipe.yaml"), offline=False, fetch=True)
        huggingface_hub.close_session()
    assert asked(sources) == ["a4", "b0"]
    assert isinstance(heldout, Path) and heldout.name == "test-00000-of-00001.jsonl"


def test_the_held_out_rows_are_a_split_of_the_set(tmp_path: Path) -> None:
    """One file of it; a slice, several files and a name that no split has are refused."""
    for name in ("train", "test", "dev-a", "dev-b"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{name}.jsonl").write_bytes(lines(exchange(name)))

    def held_out(split: str, source: str = "set") -> object:
        (tmp_path / "recipe.yaml").write_text(RECIPE + f"  source: {source}\n  eval: {split}\n")
        return data_sources(load(tmp_path / "recipe.yaml"), offline=True, fetch=False)[1]

    assert held_out("test") == tmp_path / "set" / "test.jsonl"
    assert held_out("test", "org/rows") == 0.1  # not here yet
    for split, message in (
        ("test[:10%]", "is a slice"),
        ("dev", "2 files, and one file is needed"),
        ("gold", "no data file of the split 'gold'"),
    ):
        with pytest.raises(DataError, match=message):
            held_out(split)
    with pytest.raises(DataError, match="there is no file test"):
        held_out("test", "set/train.jsonl")


def test_the_only_line_of_a_file_is_a_row(tmp_path: Path) -> None:
    """E6: what is one line in a file of lines is a row, whatever lists it holds; lists of rows are rows."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    row = {"prompt": "Hi", "chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "No."}]}
    for number, name in enumerate(("a.jsonl", "a.ndjson", "a.jsonl.gz")):
        data = json.dumps(row).encode() + b"\n" * number
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        assert asked((Source((tmp_path / name,)),)) == ["Hi"], name
    (tmp_path / "b.jsonl").write_text(json.dumps({"data": [exchange("Hi"), exchange("Ho")]}))
    assert asked((Source((tmp_path / "b.jsonl",)),)) == ["Hi", "Ho"]


@pytest.mark.parametrize("pack", [None, gzip.compress], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", ["list.json", "conversations.json", "lines.jsonl", "table.csv", "excel.csv"])
def test_a_large_file_is_not_held(
    kind: str, pack: Callable[[bytes], bytes] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read piece by piece, its rows are those of a small file, each time they are gone through."""
    rows = [{"prompt": f'Why "{number}"?\n,;]', "completion": "Because, é"} for number in range(40)]
    turns = [
        [{"role": "user", "content": "]"}, {"role": "assistant", "content": row["prompt"]}] for row in rows
    ]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["prompt", "completion"], delimiter=";" if kind == "excel.csv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    text = {
        "list.json": json.dumps(rows, indent=1),
        "conversations.json": json.dumps(turns),
        "lines.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "table.csv": table.getvalue(),
        "excel.csv": "sep=;\r\n" + table.getvalue(),
    }[kind]
    path = tmp_path / (kind + (".gz" if pack else ""))
    path.write_bytes(pack(text.encode()) if pack else text.encode())
    small = read_file(path)
    monkeypatch.setattr("forge.data.files._HELD_BYTES", 1000)
    monkeypatch.setattr("forge.data.json_rows._PIECE", 50)
    large = read_file(path)
    assert isinstance(small.rows, list) and not isinstance(large.rows, list)
    assert (list(large.rows), list(large.rows), large.kind) == (small.rows, small.rows, small.kind)
    assert len(large.rows) == 40 and next(iter(large.rows)).file == path.name


def test_a_large_document_is_said_to_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One JSON document that is no list of rows cannot be read row by row; a list can."""
    monkeypatch.setattr("forge.data.files._HELD_BYTES", 1000)
    rows = [exchange("x" * 100)] * 20
    for whole, warnings in ((rows, 0), ({"data": rows}, 1)):
        told = Told()
        report.configure(sink=told)
        (tmp_path / "rows.json").write_text(json.dumps(whole))
        assert len(read_file(tmp_path / "rows.json").rows) == 20
        texts = [text for kind, text in told.texts if kind == "warning"]
        assert len(texts) == warnings
        assert all(text.startswith("rows.json (0 MB) is held whole in memory") for text in texts)


def test_a_packed_file_that_is_rewritten_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E9: the rows are those of the file as it is now, large before and after, or small after."""
    monkeypatch.setattr("forge.data.files._HELD_BYTES", 1000)
    path = tmp_path / "rows.jsonl.gz"
    for count, word in ((100, "old"), (200, "new"), (3, "small")):
        path.write_bytes(gzip.compress(lines(*[exchange(word)] * count)))
        assert [row.values for row in read_file(path).rows] == [exchange(word)] * count


def test_a_large_table_in_another_encoding_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"prompt,completion\n" + b"Why?,Because.\n" * 5000 + "Schön,é\n".encode("cp1252"))
    monkeypatch.setattr("forge.data.files._HELD_BYTES", 1000)
    with pytest.raises(DataError, match=r"rows\.csv:5002 is not UTF-8"):
        read_file(path)
    assert len(read_file(path, encoding="cp1252").rows) == 5001


@pytest.mark.parametrize(
    "text", ["[{}, ", "[{} {}]", "[{},]", "[{}] {}", '[{"a": NULL}]', "[3]", "[]", "[" * 5000]
)
def test_a_large_list_that_is_none_is_refused_as_a_small_one_is(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(" " * 1000 + text)
    with pytest.raises(DataError) as small:
        read_file(path)
    monkeypatch.setattr("forge.data.files._HELD_BYTES", 1000)
    with pytest.raises(DataError) as large:
        read_file(path)
    assert large.value.message == small.value.message

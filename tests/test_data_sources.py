"""Every format of file, and every fault with its file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from forge.data.conversation import Row
from forge.data.conversations import to_conversations
from forge.data.files import read_file, read_rows, slice_of
from forge.data.layout import Shape
from forge.data.problems import BadRows, refuse
from forge.data.sources import BUILTIN, files_of_split, locate, locate_all
from forge.errors import DataError, Problem, RecipeError
from forge.recipe.load import load

ROWS = [
    {"prompt": "There is bacon.", "completion": "Bacon, there is."},
    {"prompt": 'Quotes "q", commas,\nlines', "completion": "ünï 🙂"},
]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def jsonl(path: Path) -> Path:
    return write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")


def json_list(path: Path) -> Path:
    return write(path, json.dumps(ROWS))


def json_under_a_key(path: Path) -> Path:
    return write(path, json.dumps({"version": 1, "data": ROWS}))


def comma_separated(path: Path) -> Path:
    quoted = ('"{}","{}"'.format(*(value.replace('"', '""') for value in row.values())) for row in ROWS)
    return write(path, "prompt,completion\n" + "\n".join(quoted) + "\n")


def parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


def column_wise(path: Path) -> Path:
    return write(path, json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}))


def by_index(path: Path) -> Path:
    """As pandas writes by default."""
    return write(path, json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)} for key in ROWS[0]}))


def split_oriented(path: Path) -> Path:
    columns = list(ROWS[0])
    return write(
        path, json.dumps({"columns": columns, "index": [0, 1], "data": [list(row.values()) for row in ROWS]})
    )


def by_split(path: Path) -> Path:
    return write(path, json.dumps({"train": ROWS, "test": [{"prompt": "x", "completion": "y"}]}))


def of_the_viewer(path: Path) -> Path:
    return write(path, json.dumps({"rows": [{"row_idx": n, "row": row} for n, row in enumerate(ROWS)]}))


def of_the_viewer_whole(path: Path) -> Path:
    rows = [{"row_idx": n, "row": row} for n, row in enumerate(ROWS)]
    return write(path, json.dumps({"features": [{"name": "prompt"}], "rows": rows}))


def by_id(path: Path) -> Path:
    return write(path, json.dumps({f"id{n}": row for n, row in enumerate(ROWS)}))


def columns_by_split(path: Path) -> Path:
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    return write(path, json.dumps({"train": columns, "test": {key: ["x"] for key in ROWS[0]}}))


def joined_with_marks(path: Path) -> Path:
    return write(path, "".join(f"\ufeff{json.dumps(row)}\n" for row in ROWS), "utf-8-sig")


def after_the_delimiter(path: Path) -> Path:
    table = separated_by(";")(path).read_text(encoding="utf-8")
    return write(path, f"sep=;\n{table}")


def indented_objects(path: Path) -> Path:
    return write(path, "\n".join(json.dumps(row, indent=2) for row in ROWS))


def separated_by(delimiter: str, encoding: str = "utf-8") -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        with path.open("w", encoding=encoding, newline="") as stream:
            writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        return path

    return make


def in_encoding(encoding: str) -> Callable[[Path], Path]:
    return lambda path: write(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding)


def packed(pack: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(pack(jsonl(path).read_bytes()))
        return path

    return make


def zstd(path: Path) -> Path:
    import pyarrow

    data = jsonl(path).read_bytes()
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(data)
    return path


def arrow(path: Path) -> Path:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(path), table.schema) as stream:
        stream.write_table(table)
    return path


def arrow_stream(path: Path) -> Path:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)
    return path


KINDS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "lines": ("rows.jsonl", jsonl, "JSON lines"),
    "capitals": ("ROWS.JSONL", jsonl, "JSON lines"),
    "lines named .json": ("rows.json", jsonl, "JSON lines"),
    "lines named .txt": ("rows.txt", jsonl, "JSON lines"),
    "lines named nothing": ("rows", jsonl, "JSON lines"),
    "lines named .csv": ("rows.csv", jsonl, "JSON lines"),
    "a list": ("rows.json", json_list, "a JSON list"),
    "a list named .jsonl": ("rows.jsonl", json_list, "a JSON list"),
    "under a key": ("rows.json", json_under_a_key, "the JSON list under data"),
    "columns": ("rows.json", column_wise, "JSON columns"),
    "columns by index": ("rows.json", by_index, "JSON columns"),
    "columns and data": ("rows.json", split_oriented, "JSON columns"),
    "by split": ("rows.json", by_split, "the JSON list of the split train"),
    "of the viewer": ("rows.json", of_the_viewer, "the JSON list under rows"),
    "indented objects": ("rows.jsonl", indented_objects, "JSON objects"),
    "commas": ("rows.csv", comma_separated, "a table with commas"),
    "semicolons": ("rows.csv", separated_by(";"), "a table with semicolons"),
    "tabs": ("rows.tsv", separated_by("\t"), "a table with tabs"),
    "tabs named .csv": ("rows.csv", separated_by("\t"), "a table with tabs"),
    "tabs named .txt": ("rows.txt", separated_by("\t"), "a table with tabs"),
    "bars": ("rows.csv", separated_by("|"), "a table with bars"),
    "Excel's": ("rows.csv", separated_by("\t", "utf-16"), "a table with tabs in utf-16"),
    "UTF-16": ("rows.jsonl", in_encoding("utf-16"), "JSON lines in utf-16"),
    "UTF-16 without its mark": ("rows.jsonl", in_encoding("utf-16-le"), "JSON lines in utf-16-le"),
    "UTF-8 with its mark": ("rows.jsonl", in_encoding("utf-8-sig"), "JSON lines"),
    "files with their marks in one": ("rows.jsonl", joined_with_marks, "JSON lines"),
    "a list named .txt": ("rows.txt", json_list, "a JSON list"),
    "objects by their keys": ("rows.json", by_id, "JSON objects by their keys"),
    "columns by split": ("rows.json", columns_by_split, "JSON columns of the split train"),
    "of the viewer, with features": ("rows.json", of_the_viewer_whole, "the JSON list under rows"),
    "with Excel's delimiter": ("rows.csv", after_the_delimiter, "a table with semicolons"),
    "gzip": ("rows.jsonl.gz", packed(gzip.compress), "JSON lines"),
    "gzip without its name": ("rows.jsonl", packed(gzip.compress), "JSON lines"),
    "bzip2": ("rows.jsonl.bz2", packed(bz2.compress), "JSON lines"),
    "xz": ("rows.jsonl.xz", packed(lzma.compress), "JSON lines"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    """E1, E2: one record a row, in the order of the file; the content decides what it is, not the name."""
    name, make, shown = KINDS[kind]
    path = make(tmp_path / name)
    content = read_file(path)
    assert [row.values for row in content.rows] == ROWS
    assert {row.file for row in content.rows} == {name}
    assert content.kind == shown
    assert [row.values for row in read_rows(path, 1)] == ROWS[:1]


@pytest.mark.training
@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("rows.parquet", parquet, "Parquet"),
        ("rows", parquet, "Parquet"),
        ("rows.arrow", arrow, "Arrow"),
        ("rows.arrow", arrow_stream, "Arrow"),
        ("rows.jsonl.zst", zstd, "JSON lines"),
    ],
)
def test_every_table_gives_the_same_rows(
    name: str, make: Callable[[Path], Path], kind: str, tmp_path: Path
) -> None:
    content = read_file(make(tmp_path / name))
    assert [row.values for row in content.rows] == ROWS
    assert content.kind == kind


@pytest.mark.training
def test_a_table_s_nulls_are_not_in_its_structs(tmp_path: Path) -> None:
    """Arrow gives every message every key; those that the row did not have are not there."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row.values for row in read_rows(tmp_path / "rows.parquet")] == rows


def test_one_conversation_and_one_text(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    one = read_file(write(tmp_path / "one.json", json.dumps({"messages": turns}, indent=1)))
    assert ([row.values for row in one.rows], one.kind) == ([{"messages": turns}], "one JSON object")
    text = read_file(write(tmp_path / "book.txt", "Once upon a time, there was\na king.\n"))
    assert [row.values for row in text.rows] == [{"text": "Once upon a time, there was\na king.\n"}]


CHATS = [[{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hello."}] for n in (0, 1)]


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        (json.dumps(CHATS), "a JSON list of conversations"),
        ("\n".join(map(json.dumps, CHATS)), "JSON objects"),
        (json.dumps({"first": CHATS[0], "second": CHATS[1]}), "JSON conversations by their keys"),
        (json.dumps({"messages": CHATS}), "JSON columns"),
        (
            json.dumps({"conversations": [{"messages": chat} for chat in CHATS]}),
            "the JSON list under conversations",
        ),
    ],
)
def test_conversations_that_are_lists(written: str, kind: str, tmp_path: Path) -> None:
    content = read_file(write(tmp_path / "rows.json", written))
    assert [row.values for row in content.rows] == [{"messages": chat} for chat in CHATS]
    assert content.kind == kind


def test_texts_in_a_list(tmp_path: Path) -> None:
    for written in ('["a", "b"]', '{"text": ["a", "b"]}'):
        rows = read_rows(write(tmp_path / "rows.json", written))
        assert [row.values for row in rows] == [{"text": "a"}, {"text": "b"}]


def test_one_of_several_lists(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", json.dumps({"easy": ROWS, "hard": ROWS[:1]}))
    assert [row.values for row in read_file(path, split="hard").rows] == ROWS[:1]


def test_the_encoding_of_the_recipe(tmp_path: Path) -> None:
    """A file of Western Windows says nothing of itself: it is refused with its line, and read when told."""
    path = write(tmp_path / "rows.csv", "prompt,completion\na,b\ncaf\u00e9,c\n", "cp1252")
    with pytest.raises(DataError, match=r"rows\.csv:3 is not UTF-8") as caught:
        read_file(path)
    assert "data.encoding" in caught.value.hint
    assert list(read_file(path, encoding="cp1252").rows)[1].values["prompt"] == "caf\u00e9"
    with pytest.raises(DataError, match=r"data\.encoding: there is no encoding 'klingon'"):
        read_file(path, encoding="klingon")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"PK\x03\x04", "a zip archive or an Excel sheet"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x80\x04\x95", "a pickle"),
    ],
)
def test_files_that_hold_no_rows_are_named(start: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(start + b"and more")
    with pytest.raises(DataError, match=message) as caught:
        read_file(path)
    assert caught.value.hint


def test_a_packed_file_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}' * 1000)[:-20])
    with pytest.raises(DataError, match="cannot read") as caught:
        read_file(path)
    assert caught.value.hint == "the packed file is damaged: copy or download it again"


def test_spaces_behind_delimiters(tmp_path: Path) -> None:
    """E2: they are no part of a value, and a quote may follow them."""
    table = ' prompt , completion\n"a, b", "c"\nd, e\n'
    rows = read_file(write(tmp_path / "rows.csv", table)).rows
    assert [row.values for row in rows] == [
        {"prompt": "a, b", "completion": "c"},
        {"prompt": "d", "completion": "e"},
    ]
    rows = read_file(write(tmp_path / "rows.csv", "prompt,completion\nd, e\n")).rows
    assert next(iter(rows)).values["completion"] == " e"


def test_tables_put_one_after_the_other(tmp_path: Path) -> None:
    """Pitfall 51: the names of the columns are no row."""
    with pytest.raises(DataError) as caught:
        read_file(write(tmp_path / "rows.csv", "prompt,completion\na,b\n" * 2))
    assert [str(problem) for problem in caught.value.problems] == [
        "rows.csv:3: names of columns again: tables were put one after the other"
    ]


def test_lines_of_json_in_json(tmp_path: Path) -> None:
    """E1: a text in each line that is a JSON object."""
    path = write(tmp_path / "rows.jsonl", "\n".join(json.dumps(json.dumps(row)) for row in ROWS))
    assert [row.values for row in read_file(path).rows] == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("# my rows", "a comment, which JSON does not have"),
        ("// my rows", "a comment, which JSON does not have"),
        ("\0" * 50, "null characters: the file was not written to its end, or is damaged"),
    ],
)
def test_a_line_that_is_no_json_says_what_it_is(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n".join([*map(json.dumps, ROWS), line]))
    with pytest.raises(DataError) as caught:
        read_file(path)
    assert [problem.message for problem in caught.value.problems] == [message]


@pytest.mark.training
def test_values_of_a_table_that_json_has_not(tmp_path: Path) -> None:
    """E2: bytes that are UTF-8 are text, numbers and dates are written; a name that stands twice is none."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "prompt": [b"Why?", b"When?"],
        "completion": [Decimal("1.50"), Decimal("2")],
        "day": [date(2025, 1, 2)] * 2,
        "raw": [b"\xff"] * 2,
    }
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    rows = read_file(path).rows
    for answer, written in (("completion", "1.50"), ("day", "2025-01-02")):
        reading = to_conversations(rows, Shape(columns={"prompt": "prompt", "completion": answer}))
        assert reading.conversations[0].messages()[0]["content"] == "Why?"
        assert reading.conversations[0].messages()[1]["content"] == written
        (note,) = reading.notes.counts
        assert note.startswith(f"{'dates' if answer == 'day' else 'numbers'} in {answer}, written as")
    with pytest.raises(DataError, match="2 of 2 rows cannot be used") as caught:
        to_conversations(rows, Shape(columns={"prompt": "prompt", "completion": "raw"}))
    assert "raw: is bytes, not text; data.format: module:function makes one of it" in str(
        caught.value.problems[0]
    )
    twice = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r"rows\.parquet: two columns are called 'text'"):
        read_file(path)


def test_paths_that_lead_to_no_rows(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"set has no data file; in it is: rows\.zip"):
        locate_all("set", tmp_path, "train")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is neither a file nor a directory"):
        locate_all("pipe.jsonl", tmp_path, "train")
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    text = "name: a\nbase: builtin:tiny\ndata: link.jsonl\n"
    with pytest.raises(RecipeError) as caught:
        load(tmp_path / "r.yaml", text=text)
    assert caught.value.problems[0].message == "link.jsonl is a link to nothing: gone.jsonl"


def test_bad_lines_are_left_out_where_the_recipe_allows_it(tmp_path: Path) -> None:
    bad = BadRows(2)
    rows = read_file(write(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n?\n'), bad=bad).rows
    assert [row.line for row in rows] == [1, 3]
    assert [problem.line for problem in bad.skipped] == [2, 4]


@pytest.mark.parametrize(
    ("split", "kept"),
    [
        ("train", 10),
        ("train[:10%]", 1),
        ("train[:3]", 3),
        ("train[8:]", 2),
        ("train[-2:]", 2),
        ("train[50%:]", 5),
    ],
)
def test_slices(split: str, kept: int) -> None:
    """E9."""
    assert len(slice_of(10, split)) == kept


@pytest.mark.parametrize("split", ["train[", "train[1]", "train[a:b]", "train[:x%]"])
def test_slices_that_are_none(split: str) -> None:
    with pytest.raises(DataError, match="is not a slice"):
        slice_of(1, split)


def test_a_large_file_is_read_again_and_again(tmp_path: Path) -> None:
    """JSON lines of some size are not held in memory; faults keep their lines, and are told once."""
    path = tmp_path / "rows.jsonl"
    text = "".join(json.dumps({"prompt": "x" * 200, "completion": str(at)}) + "\n" for at in range(20_000))
    path.write_text("\ufeff" + text + "?\n\n", encoding="utf-8")
    bad = BadRows(1)
    content = read_file(path, bad=bad)
    assert (content.kind, len(content.rows)) == ("JSON lines", 20_000)
    assert [str(problem) for problem in bad.skipped] == ["rows.jsonl:20001: not JSON: Expecting value"]
    for _ in range(2):
        assert [row.values["completion"] for row in content.rows] == [str(at) for at in range(20_000)]
    with pytest.raises(DataError, match="1 lines are not JSON objects"):
        read_file(path)
    path.write_bytes(text.encode() + b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:20001 is not UTF-8: .* at byte \d+"):
        read_file(path)


def test_directories_patterns_and_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    names = (
        "README.md",
        "dataset_info.json",
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
    )
    for name in (*names, "data/validation-00000-of-00001.jsonl", ".cache/x.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        jsonl(folder / name)
    found = locate_all("set", tmp_path, "train[:10%]")
    assert [path.name for path in found] == ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]
    assert [path.name for path in locate_all("set", tmp_path, "dev")] == ["validation-00000-of-00001.jsonl"]
    assert locate_all("set/data/train-*.jsonl", tmp_path, "train") == found
    assert not [path for path in locate_all("set/**/*.jsonl", tmp_path, "train") if path.name == "x.jsonl"]
    with pytest.raises(DataError, match="no data file of the split 'test'"):
        locate_all("set", tmp_path, "test")
    with pytest.raises(DataError, match="no file matches"):
        locate_all("set/*.csv", tmp_path, "train")
    (tmp_path / "plain").mkdir()
    assert jsonl(tmp_path / "plain" / "a.jsonl") in locate_all("plain", tmp_path, "train")


def test_several_sets_of_one_split(tmp_path: Path) -> None:
    """gsm8k's `main` and `socratic` have the same questions, UltraChat's `train_gen` other rows."""
    for name in ("main/train", "socratic/train", "main/test"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "set" / f"{name}-00000-of-00001.jsonl", "{}")
    with pytest.raises(
        DataError, match="several sets of the split 'train': main/train, socratic/train"
    ) as caught:
        locate_all("set", tmp_path, "train[:10%]")
    assert caught.value.hint.startswith("data.split: main/train takes that one")
    (path,) = locate_all("set", tmp_path, "main/train[:10%]")
    assert path.parent.name == "main"
    assert len(locate_all("set", tmp_path, "test")) == 1
    for name in ("a/train.jsonl", "b/train.jsonl", "c/x.jsonl", "d/x.jsonl"):
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "plain" / name, "{}")
    with pytest.raises(DataError, match="several sets of the split 'train': a/train, b/train"):
        locate_all("plain", tmp_path, "train")
    for folder in ("a", "b"):
        (tmp_path / "plain" / folder / "train.jsonl").unlink()
    assert len(locate_all("plain", tmp_path, "train")) == 2  # no name says a split: all are rows


README = """---
license: mit
configs:
- config_name: main
  default: {default}
  data_files:
  - split: train
    path: data/train_sft-*
  - split: held
    path: ["rows/**", "extra.jsonl"]
- config_name: other
  data_files: other/*.jsonl
- config_name: named
  data_dir: other
tags: [a]
---
# A set
"""


def a_set_with_a_readme(folder: Path, default: str) -> None:
    for name in (
        "data/train_sft-0",
        "data/train_gen-0",
        "rows/x/a",
        "rows/b",
        "extra",
        "other/train",
        "other/test",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / f"{name}.jsonl", "{}")
    write(folder / "README.md", README.replace("{default}", default))


@pytest.mark.parametrize(
    ("split", "files"),
    [
        ("train", ["data/train_sft-0"]),
        ("train[:10%]", ["data/train_sft-0"]),
        ("main/held", ["rows/b", "rows/x/a", "extra"]),
        ("other/train", ["other/test", "other/train"]),
        ("named/test", ["other/test"]),
        ("data/train_gen", ["data/train_gen-0"]),
    ],
)
def test_the_readme_of_a_set_names_its_files(split: str, files: list[str], tmp_path: Path) -> None:
    """What `datasets` would load: its configurations, the default one where the split names none."""
    a_set_with_a_readme(tmp_path, "true")
    located = files_of_split(tmp_path, split)
    assert [path.relative_to(tmp_path).with_suffix("").as_posix() for path in located] == files


@pytest.mark.parametrize(
    ("split", "message", "hint"),
    [
        ("train", "several sets of the split 'train': main/train, other/train, named/train", "main/train"),
        ("main/test", "no split 'test'; its splits are: main/train, main/held", "main/train"),
    ],
)
def test_a_split_that_no_readme_names(split: str, message: str, hint: str, tmp_path: Path) -> None:
    a_set_with_a_readme(tmp_path, "false")
    with pytest.raises(DataError, match=message) as caught:
        files_of_split(tmp_path, split)
    assert caught.value.hint.startswith(f"data.split: {hint} takes that one")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("- config_name: a\n  data_files: hf://sets/a/b/*", "names files elsewhere: hf://sets"),
        ("- config_name: a\n  data_files: ../*.jsonl", "names files elsewhere"),
        ("- config_name: a\n  data_files: none-*.jsonl", "names none-[*].jsonl for train, and no such file"),
        ("- config_name: [a", "its configs cannot be read"),
        ("- data_files: a.jsonl", "its configs cannot be read"),
        ("- config_name: a\n  data_files: ['']", "its configs cannot be read"),
        ("- config_name: a\n  data_files: .", "a pattern that forge does not read"),
        ("- config_name: a\n  data_dir: ../other", "names files elsewhere: ../other"),
        (
            "- config_name: a\n  data_files: [{split: train, path: a.jsonl}, {split: train, path: b.jsonl}]",
            "name the files of a/train twice",
        ),
    ],
)
def test_a_readme_that_names_no_files(written: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "{}")
    write(tmp_path / "README.md", f"---\nconfigs:\n{written}\n---\n")
    with pytest.raises(DataError, match=message):
        files_of_split(tmp_path, "train")


@pytest.mark.parametrize(
    ("written", "files"),
    [
        ("configs:\n- config_name: a\n  data_files: '*'", ["a.jsonl", "b.jsonl"]),
        ("configs:\n- config_name: a\n  data_files: '**'", ["a.jsonl", "b.jsonl", "x/c.jsonl"]),
        ("configs:\n- config_name: a\n  data_files: '**.jsonl'", ["a.jsonl", "b.jsonl", "x/c.jsonl"]),
        ("configs:\n- config_name: a\n  data_files: _kept.jsonl", ["_kept.jsonl"]),
        ("configs: [{config_name: a, data_files: b.jsonl}]", ["b.jsonl"]),
        ("configs: # sets\n- config_name: a\n  data_files: b.jsonl", ["b.jsonl"]),
        ('"configs":\n- config_name: a\n  data_files: b.jsonl', ["b.jsonl"]),
        (
            "configs:\n- config_name: a\n  data_files: a.jsonl\n# more\n"
            "- config_name: b\n  default: true\n  data_files: b.jsonl",
            ["b.jsonl"],
        ),
    ],
)
def test_the_ways_to_write_a_readme(written: str, files: list[str], tmp_path: Path) -> None:
    """What a pattern matches beside rows (this README, hidden files) is not of the set."""
    for name in ("a.jsonl", "b.jsonl", "x/c.jsonl", ".cache/d.jsonl", "_kept.jsonl", "dataset_infos.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "{}")
    write(tmp_path / "README.md", f"---\n{written}\n---\n")
    assert [path.relative_to(tmp_path).as_posix() for path in files_of_split(tmp_path, "train")] == files


def test_a_split_of_another_set_than_the_default(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "{}")
    write(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: a\n  default: true\n  data_files: a.jsonl\n"
        "- config_name: b\n  data_files: {test: b.jsonl}\n---\n",
    )
    with pytest.raises(DataError, match="names no split 'test' of a, its default") as caught:
        files_of_split(tmp_path, "test")
    assert caught.value.hint == "data.split: b/test takes that one"


def test_columns_without_a_name_are_kept_apart(tmp_path: Path) -> None:
    """Excel writes them where cells were once filled: the last one's value stood for all."""
    path = write(tmp_path / "a.csv", "question;answer;;\nWhy?;So.;a note;\n")
    (row,) = read_rows(path)
    assert row.values == {"question": "Why?", "answer": "So.", "column 3": "a note", "column 4": ""}


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    """A byte order mark and empty lines are no rows."""
    path = write(tmp_path / "rows.jsonl", '\ufeff{"a": 1}\n\n  \n{"a": 2}\n')
    assert read_rows(path) == [Row({"a": 1}, "rows.jsonl", 1), Row({"a": 2}, "rows.jsonl", 4)]


def test_every_broken_line_is_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": \n[1]\n"x"\n{"a": 2}\n?\n')
    with pytest.raises(DataError, match="4 lines are not JSON objects") as caught:
        read_rows(path)
    assert caught.value.problems == (
        Problem("not JSON: Expecting value (2 times; also 6)", "", "rows.jsonl", 2),
        Problem("not an object in braces (2 times; also 4)", "", "rows.jsonl", 3),
    )


def test_many_problems_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    """Equal faults are one problem, with how many there are and where the next ones stand."""
    path = write(tmp_path / "rows.jsonl", "x\n" * 50 + "[1]\n")
    with pytest.raises(DataError, match="51 lines are not JSON objects") as caught:
        read_rows(path)
    assert [str(problem) for problem in caught.value.problems] == [
        "rows.jsonl:1: not JSON: Expecting value (50 times; also 2, 3, 4, ...)",
        "rows.jsonl:51: not an object in braces",
    ]


def test_many_kinds_of_problems_are_cut() -> None:
    problems = [Problem(f"fault {number}", "", "rows.jsonl", number) for number in range(50)]
    with pytest.raises(DataError, match=r"\(the first 20 of 50 kinds are shown\)") as caught:
        refuse(problems, "50 rows", "mend them")
    assert caught.value.problems == tuple(problems[:20])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "has no rows"),
        ("rows.jsonl", b"\n \n", "has no rows"),
        ("rows.csv", b"a,b\n", "has no rows"),
        ("rows.json", b"[]", "has no rows"),
        ("rows.json", b'{"a": 1}', "not a list of objects"),
        ("rows.json", b'{"a": [{}], "b": [{}]}', "has several lists of rows: a, b"),
        ("rows.json", b'{"a": ["x", "y"], "b": ["z"]}', "do not have the same length: a 2, b 1"),
        ("rows.json", b"[1, 2]", "item 1 of the list is not an object"),
        ("rows.tar", b"rows.jsonl".ljust(257, b"\0") + b"ustar", "is a tar archive"),
        ("rows.json", b'[{"a": 1},\n{"a" 2}]', r"rows\.json:2: not JSON"),
        ("rows.json", b'[{"a": 1, "a": 2}]', '"a" stands twice in one object'),
        ("rows.jsonl", b'{"a": "\xff"}', "is not UTF-8: invalid start byte at byte 7"),
        ("rows.csv", b'a,b\n1,"x\n', r"rows\.csv:\d: not CSV: unexpected end of data"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", "1 lines do not fit the header"),
        ("rows.csv", b"a,b\n1,2\n1\n", "1 lines do not fit the header"),
        ("rows.parquet", b"text", "is not Parquet, as its name says"),
        ("rows", b"text", "is an unknown kind of file"),
        ("rows.jsonl", b"<!doctype html>\n<html>", "is a web page, not the file"),
        ("rows.xls", b"\xd0\xcf\x11\xe0\xa1\xb1", "is an Excel sheet or a Word document"),
    ],
)
def test_faults_of_a_file(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert caught.value.code == 2


def test_two_values_of_one_key(tmp_path: Path) -> None:
    """Pitfall 51: of two values of one key the last would be learned without a word."""
    path = write(tmp_path / "rows.jsonl", '{"a": 1}\n{"a": {"b": 1, "c": 2, "b": 1}}\n')
    with pytest.raises(DataError) as caught:
        read_rows(path)
    (problem,) = caught.value.problems
    assert str(problem) == 'rows.jsonl:2: "b" stands twice in one object; keep the value that is meant'


def test_lines_that_do_not_fit_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'a,b\n1,2\n1,2,3\n"x\ny",2\n1\n')
    with pytest.raises(DataError, match="2 lines do not fit the header") as caught:
        read_rows(path)
    assert [str(problem) for problem in caught.value.problems] == [
        "rows.csv:3: more values than columns",
        "rows.csv:6: fewer values than columns",
    ]


@pytest.mark.training
def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", "PAR1 and no table")
    with pytest.raises(DataError, match="is not a whole Parquet file"):
        read_rows(path)


@pytest.mark.parametrize(
    ("source", "split", "is_known"),
    [
        ("rows.csv", "train", True), ("rows.csv", "train[:10%]", True), ("rows.csv", "test", False),
        ("test.csv", "test", True), ("dev-00000.csv", "validation", True), ("builtin:yoda", "test", False),
        ("*.csv", "test", True), ("*.csv", "other", False),
    ],
)  # fmt: skip
def test_a_split_of_which_nothing_has_the_name(
    source: str, split: str, is_known: bool, tmp_path: Path
) -> None:
    for name in ("rows.csv", "test.csv", "dev-00000.csv"):
        write(tmp_path / name, "prompt,completion\na,b\n")
    if is_known:
        assert locate_all(source, tmp_path, split)
        return
    with pytest.raises(DataError, match="nothing says which rows of"):
        locate_all(source, tmp_path, split)


def test_locate(tmp_path: Path) -> None:
    inside = write(tmp_path / "rows.jsonl", "{}")
    assert locate("rows.jsonl", tmp_path) == inside
    assert locate(str(inside), Path("/nowhere")) == inside
    assert locate("builtin:yoda", tmp_path) == BUILTIN / "yoda.jsonl"
    for source, message in {
        "absent.jsonl": r"absent\.jsonl does not exist",
        "builtin:gollum": "there is no built-in data 'builtin:gollum'",
    }.items():
        with pytest.raises(DataError, match=message):
            locate(source, tmp_path)

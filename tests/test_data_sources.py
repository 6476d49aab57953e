"""Every format of file, and every fault with its file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from forge.data.conversation import Row
from forge.data.files import read_rows
from forge.data.problems import refuse
from forge.data.sources import BUILTIN, digest_of, locate
from forge.errors import DataError, Problem

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


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rows.jsonl", jsonl),
        ("ROWS.JSONL", jsonl),
        ("rows.json", json_list),
        ("rows.json", json_under_a_key),
        ("rows.csv", comma_separated),
        pytest.param("rows.parquet", parquet, marks=pytest.mark.training),
    ],
)
def test_every_format_gives_the_same_rows(name: str, make: Callable[[Path], Path], tmp_path: Path) -> None:
    """E1, E2: one record a row, in the order of the file."""
    path = make(tmp_path / name)
    rows = read_rows(path)
    assert [row.values for row in rows] == ROWS
    assert {row.file for row in rows} == {name}
    assert [row.values for row in read_rows(path, 1)] == ROWS[:1]


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
        ("rows.json", b'{"a": [{}], "b": [{}]}', "not a list of objects"),
        ("rows.json", b"[1, 2]", "not a list of objects"),
        ("rows.json", b'[{"a": 1},\n{"a" 2}]', r"rows\.json:2: not JSON"),
        ("rows.jsonl", b'{"a": "\xff"}', "is not UTF-8: invalid start byte at byte 7"),
        ("rows.csv", b'a,b\n1,"x\n', r"rows\.csv:\d: not CSV: unexpected end of data"),
        ("rows.csv", b"a,b\n1,2\n1,2,3\n", "1 lines do not fit the header"),
        ("rows.csv", b"a,b\n1,2\n1\n", "1 lines do not fit the header"),
        ("rows.parquet", b"text", "is not Parquet, as its name says"),
        ("rows", b"text", "is an unknown kind of file"),
    ],
)
def test_faults_of_a_file(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(path)
    assert caught.value.code == 2


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


def test_digest(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "{}")
    assert digest_of(path) == hashlib.sha256(b"{}").hexdigest()

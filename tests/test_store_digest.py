"""Digests of values, files and trees, and the cache of digests."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.errors import DataError
from forge.store.digest import DigestCache, canonical, digest, file_digest, tree_digest

QUICK = settings(deadline=None, database=None, max_examples=50)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def aged(path: Path, content: bytes) -> Path:
    """A file that was written a minute ago; the cache does not trust fresh ones."""
    path.write_bytes(content)
    before = path.stat().st_mtime_ns - 60_000_000_000
    os.utime(path, ns=(before, before))
    return path


def test_the_canonical_form_is_known() -> None:
    value: Any = {"b": [1, 2.0, 2e-4, True, None], "a": {"é": "x", "Z": ()}}
    text = '{"a":{"Z":[],"\\u00e9":"x"},"b":[1,2.0,0.0002,true,null]}'
    assert canonical(value) == text
    assert digest(value) == sha(text.encode())


@QUICK
@given(VALUES)
def test_what_was_written_as_json_and_read_back_has_the_same_digest(value: Any) -> None:
    assert digest(json.loads(json.dumps(value))) == digest(value)


@QUICK
@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_keys_is_of_no_account(value: dict[str, int]) -> None:
    assert digest(dict(reversed(value.items()))) == digest(value)


def test_equal_looking_values_differ() -> None:
    assert len({digest(value) for value in (1, 1.0, True, "1", [1], None, 0, -0.0, 0.0, "")}) == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest(value)


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(TypeError):
        digest({"path": Path("x")})  # type: ignore[dict-item]


def test_a_tree_is_its_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    (tmp_path / "y").write_bytes(b"2")
    both = tree_digest(tmp_path, ["y", "a/x"])
    assert both == tree_digest(tmp_path, [Path("a/x"), Path("y"), "y"])
    assert both == digest([["a/x", sha(b"1")], ["y", sha(b"2")]])
    (tmp_path / "y").rename(tmp_path / "z")
    assert tree_digest(tmp_path, ["z", "a/x"]) != both


def test_a_file_that_is_not_there_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: cannot be read: No such file"):
        file_digest(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot be read"):
        file_digest(tmp_path)


def test_the_cache_is_asked_before_the_file(tmp_path: Path) -> None:
    path, cache = aged(tmp_path / "model", b"weights"), tmp_path / "cache"
    assert file_digest(path, DigestCache(cache)) == sha(b"weights")
    lie = "0" * 64
    cache.write_text(cache.read_text().replace(sha(b"weights"), lie))
    assert file_digest(path, DigestCache(cache)) == lie, "the file was read although it is known"
    link = tmp_path / "link"
    link.symlink_to(path)
    assert file_digest(link, DigestCache(cache)) == lie, "the real path counts"


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path, cache = aged(tmp_path / "model", b"weights"), DigestCache(tmp_path / "cache")
    assert file_digest(path, cache) == sha(b"weights")
    aged(path, b"WEIGHTS")  # same size, another time
    assert file_digest(path, cache) == sha(b"WEIGHTS")
    modified = path.stat().st_mtime_ns
    with path.open("ab") as stream:
        stream.write(b"!")
    os.utime(path, ns=(modified, modified))  # same time and inode, another size
    assert file_digest(path, cache) == sha(b"WEIGHTS!")
    replaced = aged(tmp_path / "other", b"Weights!")
    os.utime(replaced, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    replaced.replace(path)  # same size and time, another inode
    assert file_digest(path, cache) == sha(b"Weights!")


def test_a_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = aged(tmp_path / "model", b"weights"), hashlib.file_digest

    def slowly(stream: Any, name: str) -> Any:
        found = read(stream, name)
        path.write_bytes(b"WEIGHTS")
        return found

    monkeypatch.setattr(hashlib, "file_digest", slowly)
    with pytest.raises(DataError, match="model: changed while it was read"):
        file_digest(path, DigestCache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_fresh_file_is_not_remembered(tmp_path: Path) -> None:
    path, cache = tmp_path / "model", tmp_path / "cache"
    path.write_bytes(b"now")
    assert file_digest(path, DigestCache(cache)) == sha(b"now")
    assert not cache.exists()


def test_a_read_only_cache_is_read_and_not_written(tmp_path: Path) -> None:
    path, cache = aged(tmp_path / "model", b"weights"), tmp_path / "cache"
    only = DigestCache(cache, read_only=True)
    assert file_digest(path, only) == sha(b"weights")
    assert not cache.exists()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\x00",
        b'["/x", 1, 2',
        b"[]\n{}\n3\n",
        b'["/x",1,2,3,"short"]\n',
        b'[["/x"],1,2,3,"' + b"0" * 64 + b'"]',
    ],
)
def test_a_corrupt_cache_is_mended(tmp_path: Path, garbage: bytes) -> None:
    one, two, cache = aged(tmp_path / "one", b"1"), aged(tmp_path / "two", b"2"), tmp_path / "cache"
    file_digest(one, DigestCache(cache))
    good = cache.read_bytes()
    cache.write_bytes(good + garbage)
    mended = DigestCache(cache)
    assert (file_digest(one, mended), file_digest(two, mended)) == (sha(b"1"), sha(b"2"))
    assert cache.read_bytes().startswith(good)
    assert [json.loads(line)[0] for line in cache.read_text().splitlines()] == [str(one), str(two)]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    path = aged(tmp_path / "model", b"weights")
    (tmp_path / "cache").mkdir()
    assert file_digest(path, DigestCache(tmp_path / "cache")) == sha(b"weights")


def test_superseded_lines_are_dropped_in_time(tmp_path: Path) -> None:
    path, cache = aged(tmp_path / "model", b"weights"), tmp_path / "cache"
    file_digest(path, DigestCache(cache))
    line = cache.read_text()
    cache.write_text(line * 300)
    assert file_digest(path, DigestCache(cache)) == sha(b"weights")
    assert cache.read_text() == line


def test_reading_gigabytes_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The digest is that of a small file's way of reading."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 10)
    before = file_digest(path)
    monkeypatch.setattr("forge.store.digest._SHOWN_BYTES", 100)
    assert file_digest(path) == before
    assert "read model.safetensors" in "".join(capsys.readouterr())

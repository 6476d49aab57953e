"""`forge verify --recheck`: a certificate repeated from its file, and what it is not repeated of.

Covers the certificate that travels: digests, versions, seed and positions in a file of a named format.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge.errors import DataError
from forge.model.base import BUILTIN
from forge.verify import sample
from forge.verify.basis import Verdict, evidence_of, read_certificate
from forge.verify.measurement import Drawn, Positions
from tests.conftest import link_converters
from tests.models import PEFT_WARNS, make_adapter
from tests.shipping import Workshop
from tests.specimens import Specimen, write_rows

pytestmark = [pytest.mark.training, pytest.mark.programs, pytest.mark.timeout(1500), PEFT_WARNS]

TINY = BUILTIN / "tiny"
ROWS = [{"input_ids": list(range(n, n + 9)), "labels": [-100] * 4 + list(range(5))} for n in range(300)]


def test_the_same_positions_are_drawn_again_from_the_rows_that_are_kept(tmp_path: Path) -> None:
    """In the same order, and of a file of many rows only those that were looked at."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    drawn = sample.draw(ROWS, 1000, None, tokens=200)
    counted = Drawn(len(drawn.rows), 300, len(drawn.positions), 9, 9, 5, sample.SEED, drawn.positions_in)
    kept = evidence_of(path, counted)
    assert 100 < len(kept.rows) < 130
    assert {len(row["input_ids"]) for row in kept.rows} == {5}  # cut as the measurement cuts
    whole = [ROWS[number] for number in range(100)] + [
        ROWS[number] for number in sorted(drawn.positions_in.rows) if number >= 100
    ]
    again = sample.draw_again(whole, kept.positions, None)
    assert (again.rows, again.positions, again.answers) == (drawn.rows, drawn.positions, drawn.answers)


@pytest.mark.parametrize(
    "positions", [Positions((9,), ((0,),)), Positions((0,), ((8,),)), Positions((0,), ((),))]
)
def test_positions_that_are_not_in_the_rows_are_refused(positions: Positions) -> None:
    with pytest.raises(DataError, match="the certificate has positions"):
        sample.draw_again(ROWS[:2], positions, None)


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ({"ok": True, "handovers": []}, "of an older forge", "verify the file anew"),
        ({"schema": "forge-certificate", "format": 1}, "of format 1", "verify the file anew"),
        ({"schema": "forge-certificate", "format": 99}, "known is 2", "update forge"),
        ({"schema": "forge-certificate", "format": 2}, "without 'basis'", "certificate's file"),
        ({"schema": "forge-manifest", "handovers": None}, "no certificate", "certificate.json in its run"),
    ],
)
def test_what_is_no_certificate_of_this_format_is_refused(
    content: dict[str, Any], message: str, hint: str, tmp_path: Path
) -> None:
    path = tmp_path / "certificate.json"
    other = content.get("schema") == "forge-manifest"
    path.write_text(json.dumps(content if other else {"ok": True, "handovers": [], **content}))
    with pytest.raises(DataError, match=message) as refused:
        read_certificate(path)
    assert hint in str(refused.value.hint)


def test_another_verdict_says_what_differs() -> None:
    leg = {"from": "a", "to": "b", "ok": True}
    was = Verdict(True, None, (leg, {"from": "b", "to": "live server", "ok": True}))
    here = Verdict(False, "convert", ({**leg, "ok": False}, {"from": "b", "to": "c", "ok": True}))
    assert list(was.unlike(was)) == []
    assert list(was.unlike(here)) == [
        "the file was sound, here it is broken",
        "the stage at fault was none, here convert",
        "a → b was sound, here it is broken",
        "b → c was not compared, here it is sound",
    ]


@pytest.mark.slow
def test_a_certificate_is_repeated_elsewhere_and_of_the_same_files_only(tmp_path: Path) -> None:
    """Carried to another directory, in another process: equal to the bit. One byte less: refused."""
    workshop = Workshop(tmp_path / "here", link_converters(tmp_path / "home"))
    workshop.directory.mkdir()
    adapter = make_adapter(TINY, tmp_path / "here" / "adapter")
    specimen = Specimen(TINY, adapter, write_rows(TINY, tmp_path / "here"), tmp_path / "here")
    file = specimen.f16(tmp_path / "here" / "f16")
    source = ("--base", "builtin:tiny", "--adapter", str(adapter), "--gguf", str(file))
    first = workshop.forge("verify", *source, "--certificate", "c.json")
    assert first.code == 0, first.said
    assert (first.fields["schema"], first.fields["format"]) == ("forge-certificate", 2)
    basis, drawn = first.fields["basis"], first.fields["sample"]
    assert basis["items"].keys() == {"base", "gguf", "adapter"}
    assert basis["versions"]["llama.cpp"] and basis["versions"]["torch"] and drawn["seed"] == 0
    assert sum(map(len, drawn["positions_in"]["indices"])) == drawn["positions"]

    there = workshop.beside("there")
    shutil.copytree(adapter, there.directory / "adapter")
    shutil.move(file, there.directory / "model.gguf")
    shutil.move(workshop.directory / "c.json", there.directory / "c.json")
    shutil.rmtree(adapter)
    again = there.forge("verify", "--recheck", "c.json")
    assert again.code == 0, again.said
    assert again.fields["same"] and again.fields["differences"] == [] and again.fields["versions"] == {}
    for name in ("handovers", "logits", "tokens", "prompt", "greedy", "kl_by_position", "verdict"):
        assert again.fields[name] == first.fields[name], name

    # Another verdict in the certificate, and other versions.
    told = json.loads((there.directory / "c.json").read_text())
    told["handovers"][-1]["ok"], told["basis"]["versions"]["torch"] = False, "1.0"
    (there.directory / "forged.json").write_text(json.dumps(told))
    other = there.forge("verify", "--recheck", "forged.json")
    assert other.code == 5 and other.fields["same"] is False
    assert "GGUF f16 was broken, here it is sound" in other.fields["error"]["message"]
    assert other.fields["versions"]["torch"][0] == "1.0"

    # Refused before anything is loaded: another file, another base, what is not there, too many options.
    changed = bytearray((there.directory / "model.gguf").read_bytes())
    changed[-1] ^= 1
    (there.directory / "changed.gguf").write_bytes(changed)
    refused = there.forge("verify", "--recheck", "c.json", "--gguf", "changed.gguf")
    assert (refused.code, refused.fields["error"]["message"]) == (2, "not what the certificate is of: gguf")
    shutil.copytree(TINY, there.directory / "base")
    with (there.directory / "base" / "config.json").open("a") as stream:
        stream.write("\n")
    refused = there.forge("verify", "--recheck", "c.json", "--base", "base")
    assert (refused.code, refused.fields["error"]["message"]) == (2, "not what the certificate is of: base")
    (there.directory / "model.gguf").unlink()
    refused = there.forge("verify", "--recheck", "c.json")
    assert refused.code == 2 and refused.fields["error"]["hint"] == "name it with --gguf"
    refused = there.forge("verify", "--recheck", "c.json", "--max-kl", "9")
    assert refused.code == 2 and "repeats what the certificate says" in refused.fields["error"]["message"]

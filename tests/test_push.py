"""`forge push` through huggingface_hub's own client, `forge sign` by the real program (`make clients`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from forge import process
from forge.cli.main import run_command
from forge.model.licence import notice
from tests.conftest import SESSION_HOME, tree
from tests.finished_runs import CERTIFICATE, write_run
from tests.hub_stand_in import Hub, StandInRepository
from tests.json_fields import check_fields

pytestmark = [
    pytest.mark.network,
    # huggingface_hub gives its client a file as data: https://github.com/huggingface/huggingface_hub/blob/main/src/huggingface_hub/lfs.py
    pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning"),
]

TOKEN = "hf_aTokenThatNobodyMaySee"
LEG = {"from": "GGUF f16", "to": "GGUF q4_k_m", "ok": True, "kl_mean": 0.02, "kl_max": 0.5, "top1": 0.97}
FILES = {
    "adapter/adapter_model.safetensors": b"factors",
    "adapter/adapter_config.json": b'{"base_model_name_or_path": "/home/me/models/tiny", "r": 8}',
    "yoda-q4_k_m.gguf": b"weights",
    "Modelfile": b'FROM ./yoda-q4_k_m.gguf\nLICENSE """Apache\nLicense"""\n',
    "Modelfile.jinja": b'FROM ./yoda-q4_k_m.gguf\nLICENSE """Apache\nLicense"""\n',
    "certificate.json": b"rows of the user",
    "log.txt": b"paths",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(writers={TOKEN}, accepted={TOKEN}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.chdir(tmp_path)
        yield server


def made(licence: str | None = "apache-2.0", **changes: Any) -> Path:
    """A run with its files, whose manifest knows them."""
    shipped = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in FILES.items()
    }
    fields: dict[str, Any] = {
        "base": {"spec": "org/tiny", "revision": "c" * 40, "licence": licence},
        "pins": {"base": "org/tiny", "base_revision": "c" * 40},
        "artifacts": {"export": {"key": "k", "digest": "d", "files": shipped}},
        "certificate": {**CERTIFICATE, "handovers": [LEG]},
    }
    directory = write_run("yoda", **(fields | changes))
    for name, data in FILES.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def pushed(
    capsys: pytest.CaptureFixture[str], *more: str, to: str = "me/yoda", code: int = 0
) -> dict[str, Any]:
    capsys.readouterr()
    found = run_command(["push", "yoda", "--to", to, *more, "-v", "--json"])
    printed = capsys.readouterr()
    assert found == code, printed.err
    assert TOKEN not in printed.out + printed.err
    fields: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    return fields


def test_a_run_is_pushed_with_its_card(hub: Hub, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """J3: the adapter at the root, the GGUF with its Modelfiles, licence, card; nothing of this machine."""
    made()
    fields = pushed(capsys)
    repository = hub.repositories["me/yoda"]
    assert fields["url"] == f"{hub.url}/me/yoda" and fields["commit"] == repository.commit
    assert fields["files"] == sorted(repository.files) == sorted([
        "adapter_model.safetensors", "adapter_config.json", "yoda-q4_k_m.gguf", "Modelfile",
        "Modelfile.jinja", "LICENSE", "README.md",
    ])  # fmt: skip
    assert repository.files["yoda-q4_k_m.gguf"] == b"weights" and not repository.private
    assert repository.files["LICENSE"] == b"Apache\nLicense"
    assert json.loads(repository.files["adapter_config.json"]) == {"base_model_name_or_path": "tiny", "r": 8}
    card = repository.files["README.md"].decode()
    _, front, body = card.split("---\n", 2)
    assert front.splitlines() == [
        'license: "apache-2.0"', 'base_model: "org/tiny"', "base_model_relation: adapter",
        "library_name: peft", "pipeline_tag: text-generation", 'tags: ["forge", "gguf", "lora"]',
    ]  # fmt: skip
    for text in (
        "| learning_rate | 0.0002 |", "| GGUF f16 → GGUF q4\\_k\\_m | ok | 0.02 | 0.5 | 97.00 % |",
        "| Hello \\<b\\> | yoda: hi |", "3.0000 before training", "llama-server -m yoda-q4_k_m.gguf",
        "ollama create yoda -f Modelfile.jinja", hashlib.sha256(b"weights").hexdigest(),
    ):  # fmt: skip
        assert text in body, card
    assert not any(TOKEN.encode() in (content or b"") for content in tree(tmp_path).values())


def test_private_and_a_choice_of_files(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    made()
    assert "yoda-q4_k_m.gguf" not in pushed(capsys, "--private", "--what", "adapter")["files"]
    assert hub.repositories["me/yoda"].private
    hub.repositories["me/open"] = StandInRepository({})
    error = pushed(capsys, "--private", to="me/open", code=2)["error"]
    assert "everybody can read it" in error["message"] and hub.repositories["me/open"].files == {}
    assert "keep_merged" in pushed(capsys, "--what", "merged", code=2)["error"]["hint"]


def test_an_interrupted_push_sends_only_what_is_left(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    made()
    hub.objects[hashlib.sha256(b"factors").hexdigest()] = b"factors"
    hub.refused_uploads = 1
    pushed(capsys, code=3)
    assert hub.repositories["me/yoda"].files == {}, "nobody sees half a model"
    before = len(hub.requests)
    pushed(capsys)
    sent = [path for method, path in hub.requests[before:] if method == "PUT"]
    assert sent == [f"objects/{hashlib.sha256(b'weights').hexdigest()}"]


def test_a_dry_run_shows_the_card_and_asks_nobody(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    made("llama3.2")
    fields = pushed(capsys, "--dry-run", to="me/Llama-yoda")
    assert fields["commit"] is None and hub.requests == []
    assert (
        "Built with Llama. Llama 3.2 is licensed" in fields["card"] and notice("llama3.2") in fields["card"]
    )


@pytest.mark.parametrize(
    ("licence", "message"),
    [
        (None, "the base names no licence"),
        ("cc-by-nc-nd-4.0", "nothing that is made from the base may be published"),
        ("llama3.1", "must begin with Llama"),
    ],
)
def test_what_the_bases_licence_does_not_allow(
    hub: Hub, capsys: pytest.CaptureFixture[str], licence: str | None, message: str
) -> None:
    """A11."""
    made(licence)
    error = pushed(capsys, code=2)["error"]
    assert message in error["message"] and error["hint"] and hub.requests == []
    assert pushed(capsys, "--licence", "mit", "--dry-run")["licence"] == "mit"


def test_what_is_not_pushed(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No login, no rights, a bad name, a changed file, a broken certificate: one line and nothing sent."""
    directory = made()
    assert "no name of a repository" in pushed(capsys, to="yoda", code=2)["error"]["message"]
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "the hub refuses the token" in pushed(capsys, code=2)["error"]["message"]
    monkeypatch.delenv("HF_TOKEN")
    assert "no login" in pushed(capsys, code=2)["error"]["message"]
    (directory / "yoda-q4_k_m.gguf").write_bytes(b"others")
    assert "not what was shipped: yoda-q4_k_m.gguf" in pushed(capsys, code=2)["error"]["message"]
    made(certificate={**CERTIFICATE, "ok": False, "verdict": "merge broke it"})
    assert "merge broke it" in pushed(capsys, code=5)["error"]["message"]
    assert hub.objects == {}


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pairs of keys in a directory, and the program that signs on the PATH."""
    programs = SESSION_HOME / "clients" / "bin"
    assert (programs / "model_signing").is_file(), "it is not there; run: make clients"
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", "")
    directory = tmp_path / "keys"
    directory.mkdir()
    for name in ("mine", "other"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{directory / name}.pem")
        openssl("ec", "-in", f"{directory / name}.pem", "-pubout", "-out", f"{directory / name}.pub")
    return directory


def openssl(*arguments: str) -> None:
    assert process.run(["openssl", *arguments]).status == 0


def sign(
    capsys: pytest.CaptureFixture[str], target: str, option: str, key: Path, code: int = 0
) -> dict[str, Any]:
    """The fields of `forge sign`, or of its error."""
    capsys.readouterr()
    status = run_command(["sign", target, option, str(key), "--json"])
    printed = capsys.readouterr()
    assert status == code, printed.err
    fields: dict[str, Any] = json.loads(printed.out.splitlines()[-1])
    check_fields(["sign"], fields)
    return fields.get("error", fields)  # type: ignore[no-any-return]


@pytest.mark.programs
@pytest.mark.slow
def test_a_signature_holds_for_these_very_files(
    keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """J3: a changed, an added and a lost file, another key; what a download leaves behind is no change."""
    monkeypatch.chdir(tmp_path)
    directory = made().absolute()
    signature = str(directory / "model.sig")
    assert sign(capsys, "yoda", "--key", keys / "mine.pem") == {
        "target": str(directory), "signature": signature, "checked": False,
    }  # fmt: skip
    (directory / ".cache").mkdir()
    (directory / ".cache" / "left").touch()
    assert sign(capsys, "yoda", "--check", keys / "mine.pub")["checked"]
    assert "Key mismatch" in sign(capsys, "yoda", "--check", keys / "other.pub", code=5)["message"]
    weights, new = directory / "yoda-q4_k_m.gguf", directory / "new"
    new.touch()
    assert "Extra files" in sign(capsys, "yoda", "--check", keys / "mine.pub", code=5)["message"]
    new.unlink()
    weights.write_bytes(b"others")
    assert f"for '{weights.name}'" in sign(capsys, "yoda", "--check", keys / "mine.pub", code=5)["message"]
    weights.unlink()
    assert "Missing files" in sign(capsys, "yoda", "--check", keys / "mine.pub", code=5)["message"]


@pytest.mark.programs
@pytest.mark.slow
def test_keys_that_cannot_sign_and_a_file_by_itself(
    keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    openssl("genrsa", "-out", str(keys / "rsa.pem"), "2048")
    locked = ["-aes256", "-passout", "pass:x", "-out", str(keys / "locked.pem")]
    openssl("ec", "-in", str(keys / "mine.pem"), *locked)
    for name, words in (
        ("rsa.pem", "prime256v1"),
        ("locked.pem", "takes the password off"),
        ("mine.pub", ""),
    ):
        assert words in sign(capsys, str(file), "--key", keys / name, code=2)["hint"]
    assert sign(capsys, str(file), "--key", keys / "mine.pem")["signature"] == f"{file}.sig"
    assert sign(capsys, str(file), "--check", keys / "mine.pub")["checked"]


@pytest.mark.programs
@pytest.mark.slow
def test_a_pushed_signature_holds_for_the_download(
    hub: Hub, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made()
    fields = pushed(capsys, "--what", "adapter", "--what", "gguf", "--sign", str(keys / "mine.pem"))
    assert "forge sign yoda --check PUBLIC.pem" in fields["card"]
    download = tmp_path / "download"
    for name, data in {**hub.repositories["me/yoda"].files, ".gitattributes": b""}.items():
        (download / name).parent.mkdir(exist_ok=True)
        (download / name).write_bytes(data)
    assert sign(capsys, str(download), "--check", keys / "mine.pub")["checked"]
    (download / "README.md").write_text("another card")
    assert "README.md" in sign(capsys, str(download), "--check", keys / "mine.pub", code=5)["message"]
    asked = len(hub.requests)
    assert "not signed" in pushed(capsys, "--sign", str(keys / "mine.pub"), code=2)["error"]["message"]
    assert len(hub.requests) == asked


def test_what_signing_needs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made()
    monkeypatch.setenv("PATH", str(tmp_path))
    key = tmp_path / "key.pem"
    assert "no such key" in sign(capsys, "yoda", "--key", key, code=2)["message"]
    assert "no signature" in sign(capsys, "yoda", "--check", key, code=2)["message"]
    key.touch()
    assert "forge-ship[sign]" in sign(capsys, "yoda", "--key", key, code=3)["hint"]
    assert run_command(["sign", "yoda"]) == 2

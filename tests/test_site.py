"""The documents as a site: built strictly and whole, with nothing in a page that comes from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from forge.process import Child
from tests.conftest import ROOT, SESSION_HOME

pytestmark = [pytest.mark.programs, pytest.mark.slow]

_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
# A page's own address and its neighbours' are named, not loaded.
_NAMED = {"canonical", "prev", "next"}


class _Loaded(HTMLParser):
    """The addresses that a browser fetches with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        address = found.get(_LOADS.get(tag, ""))
        if address and found.get("rel") not in _NAMED:
            self.addresses.append(address)


def loaded(page: str) -> list[str]:
    parser = _Loaded()
    parser.feed(page)
    return parser.addresses


def mkdocs(configuration: Path, out: Path) -> tuple[int, str]:
    program = SESSION_HOME / "mkdocs" / "bin" / "mkdocs"
    assert program.is_file(), f"{program} is not there; run: make mkdocs"
    command = [str(program), "build", "--strict", "-f", str(configuration), "-d", str(out)]
    with Child(command, environment={"NO_MKDOCS_2_WARNING": "1"}) as child:
        said = "\n".join(child.lines())
        return child.wait(), said


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "site"
    code, said = mkdocs(ROOT / "mkdocs.yml", out)
    assert code == 0, said
    return out


def test_every_document_is_a_page(site: Path) -> None:
    documents = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    pages = {path.relative_to(site) for path in site.rglob("index.html")}
    expected = {
        path.with_name("index.html") if path.stem == "index" else path.with_suffix("") / "index.html"
        for path in documents
    }
    assert pages == expected and len(pages) > 15
    assert "train.lora" in (site / "recipe" / "index.html").read_text(encoding="utf-8")
    assert (site / "quickstart.ipynb").is_file() and not (site / "requirements.txt").exists()


def test_no_page_loads_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        addresses = loaded(text)
        assert addresses and [one for one in addresses if re.match(r"(?:[a-z]+:)?//", one)] == [], page
        assert "fonts.g" not in text
    for style in site.rglob("*.css"):
        assert (
            re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")) == []
        )


def test_what_is_loaded_is_seen() -> None:
    page = (
        '<link rel="stylesheet" href="https://a/b.css"><link rel="canonical" href="https://c"><img src=d.png>'
    )
    assert loaded(page) == ["https://a/b.css", "d.png"]


@pytest.mark.parametrize(
    "fault",
    ["[gone](gone.md)", "[no such place](index.md#none)", "[outside](../README.md)", "[root](/index.md)"],
)
def test_a_wrong_link_is_an_error(fault: str, tmp_path: Path) -> None:
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "mkdocs.yml").write_text(configuration.partition("nav:")[0], encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Here\n\n{fault}\n", encoding="utf-8")
    code, said = mkdocs(tmp_path / "mkdocs.yml", tmp_path / "out")
    assert code == 1 and "Aborted with" in said

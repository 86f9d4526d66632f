"""The HTML page: it needs nothing but itself, and believes no string from outside."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from lit_deconv.cli import main

EVIL = "<script>alert('x')</script>&\"{{CARDS}}"


class Page(HTMLParser):
    """Elements and their attributes, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(folder: Path) -> str:
    named = EVIL.replace("/", "\N{DIVISION SLASH}")  # no file name holds a slash
    Path("pictures/0.png").rename(Path("pictures", f"{named}.png"))
    words = ["--layers", "1,5", "--channels", "3", "--compare", "NeuronDeconvolution"]
    model = ["--model", "my_nets:build", "--report"]
    assert main(["attribute", "pictures", *model, *words]) == 0
    return Path("attributions/report.html").read_text(encoding="utf-8")


def test_it_refers_to_nothing_outside(page: str) -> None:
    assert not re.search(r"https?:|//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))
    read = Page(page)
    assert not read.all("link")
    assert all("src" not in script for script in read.all("script"))
    assert "Neuron<wbr>Deconvolution x activation" in page
    sources = [str(image["src"]) for image in read.all("img") if "src" in image]
    assert len(sources) == 6 * (1 + 3)  # for each channel its units, and a comparison of three
    for source in sources:
        kind, _, code = source.partition(";base64,")
        assert kind in ("data:image/png", "data:image/jpeg")
        assert min(Image.open(io.BytesIO(base64.b64decode(code))).size) > 90
    (policy,) = [m for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy["content"])


def test_strings_from_outside_are_escaped(page: str) -> None:
    read = Page(page)
    assert len(read.all("script")) == 1
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert any("{{CARDS}}" in words for words in read.words)  # a file name is no marker


def test_it_holds_what_the_index_holds(page: str) -> None:
    index = json.loads(Path("attributions/index.json").read_text())
    cards = Page(page).all("article")
    layers = list(index["layers"])
    for card in cards:
        layer, channel = layers[int(str(card["data-layer"]))], int(str(card["data-channel"]))
        largest = max(
            unit["activation"]
            for unit in index["units"]
            if (unit["layer"], unit["channel"]) == (layer, channel)
        )
        assert float(str(card["data-activation"])) == pytest.approx(largest, rel=1e-5)
    assert len(cards) == 6 + 6


def test_a_name_from_the_command_line_is_escaped(folder: Path) -> None:
    Path("evil.py").write_text("from my_nets import build\nglobals()['<b>build'] = build\n")
    words = ["--model", "evil:<b>build", "--layers", "5", "--seed", "layer", "--report"]
    assert main(["attribute", "pictures/0.png", *words]) == 0
    page = Path("attributions/report.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "evil:&lt;b&gt;build" in page

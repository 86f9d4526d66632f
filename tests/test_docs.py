"""The documents: what they show runs, what they name is there, and the reference is up to date."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from lit_deconv.cli import LIGHTNING_COMMANDS, build_parser
from lit_deconv.commands.lightning import PREFIX, packaged_configs
from lit_deconv.engine.registry import RULES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


class Small(nn.Module):
    """A model with the names that the documents use."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(images)).mean((2, 3)))


def python_of(page: Path) -> str:
    """All Python of a page, in its order."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M))


def script(name: str) -> ModuleType:
    """A script of the documents as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_up_to_date() -> None:
    made = script("make_reference").reference()
    there = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert there == made, "run: python docs/make_reference.py"


def test_errors_are_up_to_date() -> None:
    made = script("make_errors").page()
    there = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert there == made, "run: python docs/make_errors.py"


def test_how_to_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # it saves a probe
    torch.manual_seed(0)
    names: dict[str, Any] = {"model": Small().eval(), "images": torch.randn(2, 3, 16, 16)}
    code = python_of(ROOT / "docs" / "how-to.md")
    # without __file__ the decorator of torch.library has nothing to go by but this name
    names["__name__"] = "how_to"
    before = dict(RULES)
    try:
        exec(compile(code, "how-to.md", "exec"), names)
    finally:
        RULES.clear()
        RULES.update(before)
    assert names["whole"].any()
    assert names["whole"].shape == names["images"].shape
    assert "path: rules" in capsys.readouterr().out
    assert isinstance(names["figure"], Image.Image)


def test_readme_runs() -> None:
    """All but the Trainer, whose model is the reader's."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    assert "Trainer(callbacks=[DeconvCallback()])" in blocks[0]
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks[1:]), "README.md", "exec"), names)
    assert names["patches"].shape[0] == len(names["units"])


def test_rule_of_the_how_to_is_the_transpose() -> None:
    code = python_of(ROOT / "docs" / "how-to.md")
    rule = code[code.index("@torch.library.custom_op") : code.index("theirs =")]
    rule = rule[: rule.index("from lit_deconv.compare")]
    # another name: an op is registered once in a process
    rule = rule.replace("mylab::scale", "mylab_docs::scale")
    names: dict[str, Any] = {"torch": torch, "Tensor": torch.Tensor, "__name__": "how_to"}
    before = dict(RULES)
    try:
        exec("from lit_deconv.engine import reverse_rule\n" + rule, names)
        scale = names["scale"]

        class Scaled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return self.relu(scale(self.conv(images), 2.0))

        from lit_deconv import Deconvnet

        model, images = Scaled().double(), torch.randn(2, 3, 8, 8).double()
        found = Deconvnet(model, "relu", path="rules").attribute(images)
        expected = nn.functional.conv_transpose2d(2 * model(images), model.conv.weight)
        assert torch.allclose(found, expected)
    finally:
        RULES.clear()
        RULES.update(before)


def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = runpy.run_path(str(ROOT / "docs" / "notebook.py"))
    assert made["single"].any()
    assert made["figure"].width == 350
    assert len(made["figure"].getcolors(1 << 24)) > 100
    assert made["explanation"].path == "rules"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_understood(page: Path) -> None:
    for line in re.findall(r"^lit-deconv (.+)$", page.read_text(), re.M):
        command, *words = shlex.split(line, comments=True)
        if command in LIGHTNING_COMMANDS:
            config = words[words.index("--config") + 1]
            assert config.removeprefix(PREFIX) in packaged_configs(), line
        else:
            assert build_parser().parse_args([command, *words]).command == command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_are_named_are_there(page: Path) -> None:
    for flag, name in re.findall(
        r"\bpython (-m )?((?:lit_deconv|benchmarks|docs)[./][\w./]+)", page.read_text()
    ):
        path = ROOT / (name.replace(".", "/") + ".py" if flag else name)
        assert path.is_file(), f"{page.name} names {name}"


def test_packaged_configs_that_are_named_are_there() -> None:
    for page in (page for page in PAGES if page.name != "errors.md"):  # where one is named wrong
        for name in re.findall(rf"{PREFIX}(\w+)", page.read_text()):
            assert name in packaged_configs(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            assert heading in anchors(file), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that code hosts give the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_figures_of_the_readme_are_small() -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / name).stat().st_size < 300_000

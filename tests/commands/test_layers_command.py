"""`lit-deconv layers`: the table says what a forward pass shows and what the engine finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision

from lit_deconv import Deconvnet
from lit_deconv.cli import main


@pytest.mark.usefixtures("folder")
def test_a_table_of_a_small_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "--model", "my_nets:build", "--size", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "type", "output", "field", "stride", "path"]
    assert " ".join(lines[2].split()) == "* 1 ReLU 6 x 20 x 20 5 x 5 2 x 2 rules"
    assert lines[6].startswith("*  5")
    assert lines[-1].startswith("9 layers")


@pytest.mark.usefixtures("folder")
def test_json_agrees_with_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "--model", "resnet18", "--size", "64", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    model, blank = torchvision.models.resnet18().eval(), torch.zeros(1, 3, 64, 64)
    names = ["maxpool", "layer1.0", "layer2.1.conv1", "layer4"]
    net = Deconvnet(model, names)
    fields, layouts = net.receptive_field(blank), net.layouts(blank)
    for name in names:
        assert rows[name]["field"] == list(fields[name].size)
        assert rows[name]["stride"] == list(fields[name].stride)
        assert rows[name]["output"] == [layouts[name].channels, *layouts[name].map_size]
        assert rows[name]["path"] == "rules"
    assert rows["layer1.0.relu"]["calls"] == 2
    chosen = [name for name, row in rows.items() if row["automatic"]]
    assert chosen == ["relu", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.usefixtures("folder")
def test_only_some(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "--model", "my_nets:build", "--layers", "0,5", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["0", "5"]


MIXED = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def forward(self, x):
        return self.conv(x), x.shape

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.two, self.scale, self.tail = Two(), nn.Embedding(1, 4), nn.Conv2d(4, 2, 3)
    def forward(self, x):
        y, _ = self.two(x)
        scale = self.scale(torch.tensor([0], device=x.device)).view(1, 4, 1, 1)
        return self.tail(torch.cummax(y, 2).values * scale)
"""


@pytest.mark.usefixtures("folder")
def test_what_has_no_way_back_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mixed.py").write_text(MIXED)
    assert main(["layers", "--model", "mixed:Mixed", "--size", "16", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["two.conv"]["path"] == "rules"
    assert rows["two"]["path"] is None
    assert rows["two"]["why"] == "returns no tensor"
    assert rows["scale"]["path"] is None  # it does not depend on the image
    assert rows["tail"]["path"] == "autograd"
    assert "cummax" in rows["tail"]["why"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "resnet81"], "nearest"),
        (["--model", "resnet18", "--layers", "layre1"], "layer1"),
        (["--model", "my_nets:build", "--size", "1x2x3"], "--size"),
    ],
)
def test_errors_take_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error

"""The benchmarks' errors against Captum on small images, and what those errors are taken with."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Benchmarks are no part of the package: they are found only once their folder's parent is on the path.
from benchmarks import errors as table  # noqa: E402
from benchmarks._cases import CASES, cut_off, strongest_units  # noqa: E402
from benchmarks._errors import in_the_image, relative_error  # noqa: E402
from benchmarks._measure import exponent, number  # noqa: E402


def test_small_form_agrees_with_captum_in_every_row() -> None:
    command = [sys.executable, "-m", "benchmarks.small"]
    found = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr
    errors = [float(cell) for cell in re.findall(r"\d+e[-+]\d+(?= \|)", found.stdout)]
    assert len(errors) == 4 * len(CASES)
    assert max(errors) <= 1e-5


def test_an_error_is_seen() -> None:
    reference = torch.rand(3, 1, 4, 4) + 1
    changed = reference.clone()
    changed[1, 0, 2, 2] += 1e-3
    errors = relative_error(changed, reference)
    assert errors[0] == 0
    assert errors[1] == pytest.approx(1e-3 / float(reference[1].max()), rel=1e-3)


@pytest.mark.parametrize("fault", [0.0, 1e-4])
def test_the_table_of_errors_fails_where_one_is_too_large(
    fault: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = table.reconstructions

    def wrong(
        model: nn.Module, layer: str, images: torch.Tensor, path: str, *more: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        found, used = right(model, layer, images, path, *more)
        return [each * (1 + fault * (path == "rules")) for each in found], used

    monkeypatch.setattr(table, "reconstructions", wrong)
    monkeypatch.setattr(sys, "argv", ["errors.py", "--models", "ZFNet (examples)", "--size", "64"])
    assert table.main() == int(bool(fault))
    *_, largest = rows = re.findall(r"^\| (?!model)(.+) \|$", capsys.readouterr().out, re.M)
    assert len(rows) == 3 + 1
    numbers = [float(cell) for cell in largest.split("|")[2:]]
    assert len(numbers) == 3
    assert all((number >= 0.9e-4) == bool(fault) for number in numbers)


def test_patches_go_where_their_boxes_say() -> None:
    patch = torch.arange(9.0).view(1, 1, 3, 3)
    full = in_the_image(patch, torch.tensor([[-1, 2, 2, 5]]), torch.Size([4, 4]))
    expected = torch.zeros(1, 1, 4, 4)
    expected[0, 0, 0:2, 2:4] = torch.tensor([[3.0, 4.0], [6.0, 7.0]])
    assert torch.equal(full, expected)


def test_strongest_units_are_the_maxima_of_their_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    images = torch.randn(6, 3, 8, 8)
    units = strongest_units(model, "1", images, count=8, channels=4)
    activation = model(images)
    assert units.shape == (8, 4)
    for channel in range(4):
        two = activation[:, channel].flatten(1).amax(1).topk(2)
        mine = units[units[:, 1] == channel]
        assert mine[:, 0].tolist() == two.indices.tolist()
        assert torch.equal(activation[mine.unbind(1)], two.values)


def test_a_model_is_cut_off_behind_its_layer() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    model = nn.Sequential()
    model.add_module("features", inner)
    model.add_module("head", nn.Flatten())
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(cut_off(model, "features.1")(images), inner[1](inner[0](images)))
    with pytest.raises(ValueError, match="no child 'body'"):
        cut_off(model, "body.1")


def test_exponents_and_numbers() -> None:
    assert exponent([1, 10, 100], [3, 300, 30_000]) == pytest.approx(2)
    assert [number(x) for x in (1234.5, 12.34, 0.01234, 1e-9, 0.0)] == [
        "1234",
        "12.3",
        "0.0123",
        "1.0e-09",
        "0.0",
    ]

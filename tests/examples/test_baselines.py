"""The baselines fit what they can fit, and not the generated task."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_deconv.examples import baselines
from lit_deconv.examples.composites import CompositePictures


def test_logistic_regression_solves_a_linear_task_and_not_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(800, 20, generator=generator)
    teacher = torch.randn(20, 10, generator=generator)
    labels = (x @ teacher).argmax(1)
    fit = baselines.logistic_regression((x[:600], labels[:600]), (x[600:], labels[600:]))
    assert fit.val_accuracy > 0.7  # chance is 0.1
    assert fit.gradient < 1e-3
    shuffled = labels[torch.randperm(800, generator=generator)]
    noise = baselines.logistic_regression((x[:600], shuffled[:600]), (x[600:], shuffled[600:]))
    assert noise.val_accuracy < 0.3


def test_logistic_regression_is_at_its_optimum() -> None:
    """No step away from the fit lowers the loss: its gradient is small at every penalty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    labels = torch.randint(0, 10, (200,), generator=generator)
    for penalty in baselines.PENALTIES:
        fit = baselines.logistic_regression((x, labels), (x, labels), [penalty])
        assert fit.penalty == penalty
        assert fit.gradient < 1e-3  # 0.05 at the start


def test_colour_histogram_counts_colours() -> None:
    pictures = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    pictures[0, 0, 0] = 255  # a quarter of the first picture is red
    histogram = baselines.colour_histogram(pictures, bins=2).square()
    assert histogram.shape == (2, 8)
    assert histogram[0].tolist() == pytest.approx([0.75, 0, 0, 0, 0.25, 0, 0, 0])
    assert histogram[1].tolist() == pytest.approx([1, 0, 0, 0, 0, 0, 0, 0])


def test_histogram_of_real_pictures_sums_to_one(tmp_path: Path) -> None:
    pictures = CompositePictures("val", 10, cache=tmp_path).pictures
    sums = baselines.colour_histogram(pictures).square().sum(1)
    torch.testing.assert_close(sums, torch.ones(10))


def test_command_prints_both_below_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baselines.main(["--train-count", "300", "--val-count", "200", "--cache", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:22].strip(): line[22:].split() for line in lines[2:]}
    assert rows.keys() == {"pixels", "colour histogram"}
    for train_accuracy, val_accuracy, *_ in rows.values():
        assert float(val_accuracy.rstrip("%")) < 50
        assert float(train_accuracy.rstrip("%")) > float(val_accuracy.rstrip("%"))

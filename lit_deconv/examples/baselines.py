"""How far pixels and colours alone get on the generated task.

Run as `python -m lit_deconv.examples.baselines`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lit_deconv.examples.composites import CLASS_NAMES, CompositePictures

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


class Fit(NamedTuple):
    """A logistic regression fitted to convergence, at the penalty that validates best."""

    train_accuracy: float
    val_accuracy: float
    penalty: float
    gradient: float
    """Largest entry of the gradient where the fit stopped, as a check that it converged."""


def pixels(pictures: Tensor) -> Tensor:
    """Every pixel of the pictures, uint8 [N, 3, H, W], at half the resolution: [N, 3 H W / 4]."""
    return F.avg_pool2d(pictures.float() / 255, 2).flatten(1)


def colour_histogram(pictures: Tensor, bins: int = 6) -> Tensor:
    """Joint histogram of the colours: uint8 [N, 3, H, W] -> square roots of shares [N, bins^3]."""
    levels = (pictures.long() * bins) // 256
    cells = (levels[:, 0] * bins + levels[:, 1]) * bins + levels[:, 2]
    counts = torch.zeros(len(pictures), bins**3)
    counts.scatter_add_(1, cells.flatten(1), torch.ones(cells.flatten(1).shape))
    # The root evens out the few cells that hold most of a picture.
    return (counts / cells[0].numel()).sqrt()


def logistic_regression(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    penalties: Sequence[float] = PENALTIES,
) -> Fit:
    """Fit a linear classifier for each L2 penalty and return the one best on `val`.

    Choosing on the validation set favours the baseline, as a baseline should be favoured.

    Args:
        train: features [N, features] and labels [N].
        val: the same.
        penalties: factors of the weights' squared norm to try.
    """
    mean, std = train[0].mean(0), train[0].std(0).clamp_min(1e-6)
    x, x_val = ((features - mean) / std for features in (train[0], val[0]))
    fits = [
        _fit(x, train[1], x_val, val[1], penalty)
        for penalty in tqdm(penalties, "penalties", leave=False, disable=None)
    ]
    return max(fits, key=lambda fit: fit.val_accuracy)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the accuracy of both baselines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train-count", type=int, default=5000)
    parser.add_argument("--val-count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", help="folder for the drawn pictures")
    options = parser.parse_args(argv)
    train = CompositePictures("train", options.train_count, seed=options.seed, cache=options.cache)
    val = CompositePictures("val", options.val_count, seed=options.seed, cache=options.cache)
    print(f"{len(train)} training and {len(val)} validation pictures, {len(CLASS_NAMES)} classes")
    print("logistic regression on  train acc  val acc  penalty  gradient")
    for name, features in (("pixels", pixels), ("colour histogram", colour_histogram)):
        fit = logistic_regression(
            (features(train.pictures), train.labels), (features(val.pictures), val.labels)
        )
        print(
            f"{name:22}  {fit.train_accuracy:9.1%}  {fit.val_accuracy:7.1%}"
            f"  {fit.penalty:7g}  {fit.gradient:8.0e}"
        )


def _fit(x: Tensor, labels: Tensor, x_val: Tensor, labels_val: Tensor, penalty: float) -> Fit:
    weight = torch.zeros(x.shape[1], len(CLASS_NAMES), requires_grad=True)
    bias = torch.zeros(len(CLASS_NAMES), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=300,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    assert weight.grad is not None
    with torch.no_grad():
        accuracies = [
            float(((f @ weight + bias).argmax(1) == y).float().mean())
            for f, y in ((x, labels), (x_val, labels_val))
        ]
    return Fit(accuracies[0], accuracies[1], penalty, float(weight.grad.abs().max()))


if __name__ == "__main__":
    main()

"""The slow definition of a reverse rule: the op's Jacobian as a matrix in float64, transposed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One op in one form.

    Args:
        name: Its name in the list of tests.
        make: Makes the op: an ``nn.Module``, or a function of the input.
        shape: Shape of the input, samples first.
        frozen: Given the op and the input, the function whose Jacobian counts: the op itself with
            what the rule keeps constant held fixed. None: the op itself.
        positive: The input is positive (for logarithms and roots).
        tolerance: Largest relative error; wider where the op itself leaves float64.
        path: The path that "auto" takes.
    """

    name: str
    make: Callable[[], Function]
    shape: tuple[int, ...] = (2, 4, 6, 5)
    frozen: Callable[[Function, Tensor], Function] | None = None
    positive: bool = False
    tolerance: float = 1e-10
    path: str = "rules"

    def __str__(self) -> str:
        return self.name


class Layer(nn.Module):
    """A function as a layer of its own, in a model that is nothing else."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def built(case: Case) -> tuple[nn.Module, Tensor, Function]:
    """The model of a case with its layer "0", the input, and the function whose Jacobian counts."""
    torch.manual_seed(sum(map(ord, case.name)))
    function = case.make()
    if isinstance(function, nn.Module):
        function = function.double().eval()
        with torch.no_grad():
            for tensor in (*function.parameters(), *function.buffers()):
                if tensor.is_floating_point():
                    tensor.uniform_(0.2, 1.2) if tensor.ndim < 2 else tensor.normal_()
    x = torch.randn(case.shape, dtype=torch.float64)
    x = x.abs() + 0.5 if case.positive else x
    # A copy: what a rule does to the layer must not reach its definition.
    own = copy.deepcopy(function)
    return nn.Sequential(Layer(function)), x, case.frozen(own, x) if case.frozen else own


def jacobians(function: Function, x: Tensor) -> Tensor:
    """Each image's Jacobian [N, *out, *in], and a proof that no image's output sees another image."""
    leaf = x.clone().requires_grad_()
    out = function(leaf * 1)
    own = x.new_zeros(len(x), out[0].numel(), x[0].numel())
    for image in range(len(x)):
        for unit in range(out[0].numel()):
            (row,) = torch.autograd.grad(
                out[image].flatten()[unit], leaf, retain_graph=True, materialize_grads=True
            )
            assert not row.index_fill(0, torch.tensor(image), 0).any(), "the op mixes images"
            own[image, unit] = row[image].flatten()
    return own.view(len(x), *out.shape[1:], *x.shape[1:])


def transposed(jacobian: Tensor, signal: Tensor, x: Tensor) -> Tensor:
    """J^T signal, image by image."""
    matrix = jacobian.reshape(len(x), -1, x[0].numel())
    return (matrix.mT @ signal.reshape(len(x), -1, 1)).reshape(x.shape)


def seeded_with(signal: Tensor) -> Callable[[Tensor], Tensor]:
    """A selector whose seed is a given signal: a scalar of value 1 whose gradient the signal is."""
    return lambda y: 1 + ((y - y.detach()) * signal).flatten(1).sum(1)


def all_units(shape: Sequence[int]) -> Tensor:
    """Every unit of a layer, [U, 2 + D]."""
    return torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape))


def one_hot(units: Tensor, activation: Tensor) -> Tensor:
    """Each unit's own activation in an otherwise empty layer, [U, C, *map]."""
    seeds = activation.new_zeros(len(units), *activation.shape[1:])
    rows = torch.arange(len(units))
    places = (rows, *units[:, 1:].T)
    seeds[places] = activation[tuple(units.T)]
    return seeds


def assert_close(given: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Equal up to a tolerance relative to the largest expected value; NaN is never equal."""
    assert given.shape == expected.shape, (given.shape, expected.shape)
    if not expected.numel():
        return
    difference = (given - expected).abs().max().item()
    scale = max(expected.abs().max().item(), 1e-300)
    assert difference <= tolerance * scale or difference == 0, f"error {difference / scale:.1e}"


def quietly(function: Callable[[], Any]) -> Any:
    """Runs something in which PyTorch has advice to give."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()

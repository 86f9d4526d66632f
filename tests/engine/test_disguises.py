"""Rectifiers and gates that do not look like ones, and what looks like them and is none.

Each case is written as users write it, and beside it by explicit rectifiers and detached gates; both
walks give that picture, of the whole layer and of single units, or say that they cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine.errors import DeconvError, UnsupportedOp

from .definition import assert_close
from .test_tape import built, rectify, referenced

Function = Callable[[Tensor], Tensor]


def _half(first: Tensor, y: Tensor) -> Tensor:
    return torch.cat([first, y[:, 2:]], 1)


def _assigned(mask: Callable[[Tensor], Any], value: Any = 0) -> Function:
    def written(y: Tensor) -> Tensor:
        z = y * 1
        z[mask(z)] = value
        return z

    return written


def _scattered(y: Tensor) -> Tensor:
    z = y * 1
    z.masked_scatter_(z < 0, torch.zeros_like(z))
    return z


def _assigned_by_some_places(y: Tensor) -> Tensor:
    z = y + 9 * torch.arange(4, dtype=y.dtype).view(4, 1, 1)
    z[torch.where(z < 0)[:2]] = 0
    return z


def _some_places_reference(y: Tensor) -> Tensor:
    z = y + 9 * torch.arange(4, dtype=y.dtype).view(4, 1, 1)
    return z * (z.detach() >= 0).flatten(2).all(2)[:, :, None, None]


def _multiplied(y: Tensor) -> Tensor:
    z = y * 1
    z[z < 0] *= 0
    return z


def _overwritten_between(y: Tensor) -> Tensor:
    mask = y[:, :2] > 0
    z = y.neg_()
    return _half(z[:, :2] * mask, z)


def _overwritten_reference(y: Tensor) -> Tensor:
    mask = (y[:, :2] > 0).detach()
    return _half(-y[:, :2] * mask, -y)


def _pooled(y: Tensor) -> Tensor:
    return F.interpolate(F.lp_pool2d(y, 2, 2, ceil_mode=True), size=y.shape[2:])


def _pooled_reference(y: Tensor) -> Tensor:
    powers = F.avg_pool2d(y**2, 2, ceil_mode=True)
    return F.interpolate((4 * powers).sqrt(), size=y.shape[2:])


def _context(y: Tensor) -> Tensor:
    return y.mean((2, 3), keepdim=True)


DISGUISED: dict[str, tuple[Function, Function]] = {
    "mask-of-an-equal-slice": (
        lambda y: _half(y[:, :2] * (y[:, :2] > 0), y),
        lambda y: _half(rectify(y[:, :2]), y),
    ),
    "where-of-an-equal-slice": (
        lambda y: _half(torch.where(y[:, :2] > 0, y[:, :2], 0.0), y),
        lambda y: _half(rectify(y[:, :2]), y),
    ),
    "mask-of-an-equal-chunk": (
        lambda y: _half(y.chunk(2, 1)[0] * (y.chunk(2, 1)[0] > 0), y),
        lambda y: _half(rectify(y[:, :2]), y),
    ),
    "mask-of-what-is-detached": (lambda y: y * (y.detach() > 0), rectify),
    "mask-of-data": (lambda y: y * (y.data > 0).to(y.dtype), rectify),
    "silu-of-equal-slices": (
        lambda y: _half(y[:, :2] * torch.sigmoid(y[:, :2]), y),
        lambda y: _half(rectify(y[:, :2]) + (F.silu(y) - F.relu(y)).detach()[:, :2], y),
    ),
    "masked_scatter": (lambda y: y.masked_scatter(y < 0, torch.zeros_like(y)), rectify),
    "masked_scatter_": (_scattered, rectify),
    "assigned-by-mask": (_assigned(lambda z: z < 0), rectify),
    "assigned-by-places": (_assigned(lambda z: torch.where(z < 0)), rectify),
    "assigned-by-nonzero": (_assigned(lambda z: (z < 0).nonzero(as_tuple=True)), rectify),
    "multiplied-by-mask": (_multiplied, rectify),
    "gate-repeated": (
        lambda y: y * torch.sigmoid(_context(y)).repeat(1, 1, *y.shape[2:]),
        lambda y: y * torch.sigmoid(_context(y)).detach(),
    ),
    "gate-expanded": (
        lambda y: y * F.relu(_context(y)).expand_as(y),
        lambda y: y * F.relu(_context(y)).detach(),
    ),
}
LOOK_ALIKE: dict[str, tuple[Function, Function]] = {
    "mask-of-another-slice": (
        lambda y: _half(y[:, :2] * (y[:, 2:] > 0), y),
        lambda y: _half(y[:, :2] * (y[:, 2:] > 0).detach(), y),
    ),
    "mask-of-another-chunk": (
        lambda y: _half(y.chunk(2, 1)[0] * (y.chunk(2, 1)[1] > 0), y),
        lambda y: _half(y[:, :2] * (y[:, 2:] > 0).detach(), y),
    ),
    "slice-overwritten-between": (_overwritten_between, _overwritten_reference),
    # What is 0 for these images alone is no bound: the larger one of two branches gets the signal.
    "maximum-with-a-dead-branch": (
        lambda y: torch.maximum(y, F.relu(y.flip(3) - 1e3)),
        lambda y: torch.maximum(y, rectify(y.flip(3) - 1e3)),
    ),
    "clamp-at-a-dead-branch": (
        lambda y: torch.clamp(y, min=F.relu(y.flip(3) - 1e3)),
        lambda y: torch.maximum(y, rectify(y.flip(3) - 1e3)),
    ),
    "where-with-a-dead-branch": (
        lambda y: torch.where(y > 0, y, F.relu(y.flip(3) - 1e3)),
        lambda y: torch.where(y > 0, y, rectify(y.flip(3) - 1e3)),
    ),
    "threshold-to-another-value": (
        lambda y: F.threshold(y, 0, -1.0),
        lambda y: torch.where(y > 0, y, -1.0),
    ),
    "assigned-by-some-places": (_assigned_by_some_places, _some_places_reference),
    "power-average-pooling": (_pooled, _pooled_reference),
    "prelu-by-hand": (
        lambda y: torch.where(y > 0, y, 0.1 * y),
        lambda y: y * torch.where(y.detach() > 0, 1.0, y.new_tensor(0.1)),
    ),
}
CASES = DISGUISED | LOOK_ALIKE


@pytest.mark.parametrize("path", ["rules", "autograd", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused_on_every_path(name: str, path: Any) -> None:
    written, reference = CASES[name]
    model, x = built(written)
    activation, expected = referenced(reference, x)
    net = Deconvnet(model, "last", path=path)
    if path == "rules" and net.explain(x).reasons:
        with pytest.raises(DeconvError):
            net.attribute(x)
        return
    assert_close(net.activations(x), activation)
    assert_close(net.attribute(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_units_are_right_too(name: str) -> None:
    written, reference = CASES[name]
    model, x = built(written)
    units = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 3], [0, 0, 4, 3]])
    leaf = x.clone().requires_grad_()
    activation = built(reference)[0](leaf * 1)
    for path in ("autograd", "auto"):
        found = Deconvnet(model, "last", path=path).reconstruct(x, units)
        for unit, image in zip(units.tolist(), found, strict=True):
            value = activation[tuple(unit)]
            (expected,) = torch.autograd.grad(value, leaf, value.detach(), retain_graph=True)
            assert_close(image, expected[unit[0]])


@pytest.mark.parametrize("path", ["rules", "autograd", "auto"])
@pytest.mark.parametrize("each", [torch._foreach_clamp_min, torch._foreach_maximum])
def test_ops_on_lists_are_refused(each: Any, path: Any) -> None:
    model, x = built(lambda y: each([y], 0.0)[0])
    with pytest.raises(UnsupportedOp):
        Deconvnet(model, "last", path=path).attribute(x)


@pytest.mark.parametrize(
    "body", [F.relu, lambda image: image * (image > 0), lambda image: image * image.sigmoid()]
)
def test_what_runs_under_vmap_is_right_by_rules_and_refused_by_autograd(body: Function) -> None:
    model, x = built(lambda y: torch.vmap(body)(y))
    plain, _ = built(body)
    assert_close(Deconvnet(model, "last").attribute(x), Deconvnet(plain, "last").attribute(x))
    with pytest.raises(UnsupportedOp, match="vmap"):
        Deconvnet(model, "last", path="autograd").attribute(x)


@pytest.mark.parametrize("path", ["rules", "auto"])
def test_control_flow_operators_are_refused(path: Any) -> None:
    class Conditional(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            found: Tensor = torch.cond(torch.tensor(True), F.relu, lambda z: z * 2, (y,))
            return found

    model, x = built(Conditional())
    with pytest.raises(UnsupportedOp, match=r"torch\.cond"):
        Deconvnet(model, "last", path=path).attribute(x)

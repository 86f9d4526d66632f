"""ReLUs written by hand with a mask of the input, on both walks; other masks are named as such."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_deconv import Deconvnet, Deconvolution

from .explicit import Body, Net, images, rect, reference


def _assigned(x: Tensor) -> Tensor:
    x[x < 0] = 0
    return x


def _assigned_zeros(x: Tensor) -> Tensor:
    x[x <= 0] = torch.zeros((), dtype=x.dtype)
    return x


def _filled(x: Tensor) -> Tensor:
    x.masked_fill_(x < 0, 0)
    return x


def _multiplied(x: Tensor) -> Tensor:
    x *= x > 0
    return x


def _mask_multiplied(x: Tensor) -> Tensor:
    mask = (x > 0).to(x)
    mask *= x
    return mask


def _put(x: Tensor) -> Tensor:
    x.index_put_((x < 0,), torch.zeros((), dtype=x.dtype))
    return x


_RECTIFIERS: dict[str, Body] = {
    "times a mask": lambda x: x * (x > 0),
    "mask first": lambda x: (x >= 0) * x,
    "reflected": lambda x: x * (0 < x),  # noqa: SIM300
    "float mask": lambda x: x * (x > 0).float(),
    "mask of x's type": lambda x: x * (x > 0).to(x),
    "mask of x's dtype": lambda x: x * (x > 0).to(x.dtype),
    "type_as": lambda x: x * (x > 0).type_as(x),
    "double": lambda x: torch.mul((x > 0).double(), x),
    "int": lambda x: x * (x > 0).int(),
    "gt": lambda x: x.gt(0).mul(x),
    "compared with zeros": lambda x: x * (x > torch.zeros_like(x)),
    "detached mask": lambda x: x * (x > 0).float().detach(),
    "negated": lambda x: x * ~(x < 0),
    "logical_not": lambda x: x * torch.logical_not(x <= 0),
    "in place": _multiplied,
    "in place on the mask": _mask_multiplied,
    "masked_fill": lambda x: x.masked_fill(x < 0, 0),
    "masked_fill torch": lambda x: torch.masked_fill(x, x <= 0, 0.0),
    "masked_fill negated": lambda x: x.masked_fill(~(x > 0), 0),
    "masked_fill_": _filled,
    "assignment": _assigned,
    "assignment of a tensor": _assigned_zeros,
    "index_put_": _put,
    "where of a negated mask": lambda x: torch.where(~(x > 0), 0.0, x),
}


@pytest.mark.parametrize("path", ["rules", "autograd", "auto"])
@pytest.mark.parametrize("name", _RECTIFIERS)
def test_a_relu_by_hand_rectifies_the_signal(name: str, path: Any) -> None:
    net, x = Net(_RECTIFIERS[name]), images()
    torch.testing.assert_close(net.body(x.clone()), torch.relu(x))
    expected = reference(rect)
    plain = reference(lambda y: y * (y > 0))
    assert (plain - expected).abs().max() > 1e-3
    given = Deconvnet(net, "last", path=path).attribute(x)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)
    found = Deconvnet(net, "last").explain(x)
    assert "rectifier" in [row.why for row in found.rows]
    assert found.captum_faults


@pytest.mark.parametrize("name", _RECTIFIERS)
def test_the_drop_in_knows_them_too(name: str) -> None:
    net, x = Net(_RECTIFIERS[name]), images()
    given = Deconvolution(net).attribute(x, target=(1, 2, 3))
    expected = Deconvolution(Net(F.relu)).attribute(x, target=(1, 2, 3))
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


def _changed_since(x: Tensor) -> Tensor:
    mask = x > 0
    x.mul_(-1)
    return x * mask


def _mask_changed_since(x: Tensor) -> Tensor:
    mask = x > 0
    mask.logical_not_()
    return x * mask


def _mask_changed_before_it_is_copied(x: Tensor) -> Tensor:
    mask = x > 0
    mask.logical_not_()
    return x * mask.to(x)


def _assigned_one(x: Tensor) -> Tensor:
    x[x < 0] = torch.ones((), dtype=x.dtype)
    return x


_OTHERS: dict[str, Body] = {
    "another bound": lambda x: x * (x > 0.1),
    "the negative part": lambda x: x * (x < 0),
    "another tensor's mask": lambda x: x * (torch.tanh(x) > 0.2),
    "filled with 1": lambda x: x.masked_fill(x < 0, 1),
    "filled where positive": lambda x: x.masked_fill(x > 0, 0),
    "assigned 1": _assigned_one,
    "chosen": lambda x: torch.where(x > 0, x, 0.5),
    "leaky": lambda x: torch.where(x > 0, x, 0.1 * x),
    "x changed since": _changed_since,
    "mask changed since": _mask_changed_since,
    "mask changed before it is copied": _mask_changed_before_it_is_copied,
}


@pytest.mark.parametrize("path", ["rules", "autograd"])
@pytest.mark.parametrize("name", _OTHERS)
def test_other_masks_keep_the_gradient_and_are_named(name: str, path: Any) -> None:
    net, x = Net(_OTHERS[name]), images()
    chosen: Any = "auto" if name == "assigned 1" and path == "rules" else path
    given = Deconvnet(net, "last", path=chosen).attribute(x)
    torch.testing.assert_close(given, reference(_OTHERS[name]), rtol=1e-12, atol=1e-12)
    found = Deconvnet(net, "last", path=path).explain(x)
    assert "gated by a mask made from the input" in [row.why for row in found.rows]


def test_what_is_detached_is_no_mask() -> None:
    found = Deconvnet(Net(lambda x: x * x.detach()), "last").explain(images())
    assert [row.why for row in found.rows] == ["adjoint", "adjoint", "adjoint"]

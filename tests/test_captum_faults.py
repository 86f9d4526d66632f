"""``explain()`` on Captum, beside Captum: where it names no fault, Captum is the deconvnet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import NeuronDeconvolution  # type: ignore[import-untyped]
from torch import Tensor, nn

from lit_deconv import Deconvnet


class Halved(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


class Renamed(nn.ReLU):
    pass


class Net(nn.Module):
    """Convolutions, ReLUs, and a function that says how they are wired."""

    def __init__(self, wiring: Callable[[Any, Tensor], Tensor], inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.c, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.r, self.q = nn.ReLU(inplace), nn.ReLU(inplace)
        self.halved, self.renamed, self.same = Halved(), Renamed(), nn.Identity()
        self.fake = type("ReLU", (nn.Module,), {"forward": lambda self, x: F.relu(x)})()
        self.loose = [nn.ReLU()]
        self.wiring = wiring
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.wiring(self, x))


def ignored(n: Any, x: Tensor) -> Tensor:
    y: Tensor = n.a(x)
    n.r(y)
    return y


def ignored_view(n: Any, x: Tensor) -> Tensor:
    y: Tensor = n.a(x)
    n.r(y[:, :3])
    return y


def call_aside(n: Any, x: Tensor) -> Tensor:
    y: Tensor = n.a(x)
    n.r(y)
    return n.r(n.b(y))


def both(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    return n.r(y) + y


def detached_skip(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    return n.r(y) + y.detach()


def masked(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    return n.r(y) * (y > 0.5)


def skip_behind(n: Any, x: Tensor) -> Tensor:
    y = n.r(n.a(x))
    return n.r(n.b(y)) + y


def two_readers(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    return n.b(n.r(y)) + n.c(n.q(y))


def detached_first(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    u = n.r(n.b(y))
    return u + n.r(n.c(y) + u.detach())


def without_gradients(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    with torch.no_grad():
        z = n.b(y)
    return n.r(n.c(y)) + z


WIRINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "one ReLU": (lambda n, x: n.r(n.a(x)), ""),
    "in sequence": (lambda n, x: n.r(n.b(n.r(n.a(x)))), ""),
    "skip from behind": (skip_behind, ""),
    "on the input": (lambda n, x: n.a(n.r(x)), ""),
    "renamed": (lambda n, x: n.renamed(n.a(x)), ""),
    "behind a view": (lambda n, x: n.r(n.q(n.a(x)).flatten(1).view(2, 6, 8, 8)), ""),
    "scaled": (lambda n, x: n.r(n.a(x) * 0.5), ""),
    "pooled": (lambda n, x: F.max_pool2d(n.r(n.a(x)), 3, 1, 1), ""),
    "returned tensor ignored": (ignored, "in place"),
    "returned view ignored": (ignored_view, "in place"),
    "skip from before": (both, "always"),
    "value of the skip": (detached_skip, "in place"),
    "mask of the input": (masked, "either"),
    "two readers": (two_readers, "always"),
    "parallel branches": (lambda n, x: n.r(n.b(x := n.a(x))) + n.r(n.c(x)), "either"),
    "another call in front, off the way": (call_aside, "always"),
    "another call behind, off the way": (lambda n, x: (y := n.r(n.a(x)), n.r(n.b(y)))[0], ""),
    "branches that share a constant": (detached_first, "either"),
    "ReLU of a ReLU": (lambda n, x: n.r(n.q(n.a(x))), "always"),
    "ReLU of itself": (lambda n, x: n.r(n.r(n.a(x))), "always"),
    "ReLU of an identity of a ReLU": (lambda n, x: n.r(n.same(n.q(n.a(x)))), "always"),
    "ReLU of a dropout of a ReLU": (
        lambda n, x: n.r(F.dropout(n.q(n.a(x)), 0.5, False)),
        "always",
    ),
    "a module that Captum does not find": (lambda n, x: n.loose[0](n.a(x)), "always"),
    "a class of that name": (lambda n, x: n.fake(n.a(x)), "always"),
    "a subclass with more in it": (lambda n, x: n.halved(n.a(x)), "always"),
    "forward, not the module": (lambda n, x: n.r.forward(n.a(x)), "always"),
    "function": (lambda n, x: F.relu(n.a(x)), "always"),
    "by hand": (lambda n, x: (lambda y: y * (y > 0))(n.a(x)), "always"),
    "gate": (lambda n, x: n.r(n.a(x)) * torch.sigmoid(n.b(n.a(x))), "always"),
    "contrast normalisation": (lambda n, x: F.local_response_norm(n.a(x), 3, 1.0), "always"),
    "group norm": (lambda n, x: F.group_norm(n.a(x), 2), "always"),
    "gradients off": (without_gradients, "always"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", WIRINGS)
def test_no_fault_is_named_only_where_captum_is_right(name: str, inplace: bool) -> None:
    wiring, faulty = WIRINGS[name]
    net = Net(wiring, inplace)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    faults = Deconvnet(net, "last").explain(x).captum_faults
    expected = Deconvnet(net, "last", path="autograd").attribute(x)
    error = (_captum(net, x) - expected).abs().max() / expected.abs().max()
    if faulty == "always" or (faulty == "in place" and inplace):
        assert error > 1e-3
        assert faults
    elif faulty != "either":
        assert error < 1e-9
        assert not faults
    else:
        assert faults or error < 1e-9


def _captum(net: Net, x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captum = NeuronDeconvolution(net, net.last)
        given: Tensor = captum.attribute(
            x.clone(), lambda layer: 0.5 * layer.square().flatten(1).sum(1)
        )
    return given


def test_a_relu_that_reads_what_is_detached_stops_captum() -> None:
    net = Net(lambda n, x: (lambda y: n.r(y.detach()) + y)(n.a(x)), False)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="require grad"):
        _captum(net, x)
    (fault,) = Deconvnet(net, "last").explain(x).captum_faults
    assert "detached" in fault


def test_which_call_captum_takes_is_not_checked() -> None:
    net = Net(lambda n, x: n.r(n.b(n.r(n.a(x)))), False)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    (fault,) = Deconvnet(net, "r", call=0).explain(x).captum_faults
    assert fault.startswith("not checked")


@pytest.mark.parametrize("path", ["rules", "autograd", "auto"])
@pytest.mark.parametrize("wiring", [ignored, both, masked])
def test_what_an_in_place_relu_returns_is_what_it_overwrote(wiring: Any, path: Any) -> None:
    """Apart on the tape, one tensor to the model."""
    net, x = Net(wiring, True), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(
        Deconvnet(net, "last", path=path).attribute(x),
        Deconvnet(net, "last", path="autograd").attribute(x),
        rtol=1e-12,
        atol=1e-12,
    )

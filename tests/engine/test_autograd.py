"""The autograd walk: rectifiers in every form, in place, on views, and wired in every way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import NeuronDeconvolution  # type: ignore[import-untyped]
from torch import Tensor, nn

from .explicit import Body, agree, images, recorded, rect, reference

# ---- rectifiers ------------------------------------------------------------------------------


def ignores(function: Callable[..., Any]) -> Body:
    """The in-place form whose returned tensor nobody uses."""

    def body(x: Tensor) -> Tensor:
        function(x)
        return x

    return body


_SLOPE = torch.full((8,), 0.2, dtype=torch.float64)
# Values: what each computes. Forms: every way to write it; "!" marks in-place ones.
_RECTIFIERS: dict[str, tuple[Body, list[Callable[..., Any]], list[Callable[..., Any]]]] = {
    "relu": (
        torch.relu,
        [nn.ReLU(), F.relu, torch.relu, lambda x: x.relu(), lambda x: F.relu(input=x)],
        [
            nn.ReLU(inplace=True), F.relu_, torch.relu_, lambda x: x.relu_(),
            lambda x: F.relu(x, True), lambda x: F.relu(x, inplace=True),
        ],
    ),
    "relu by hand": (
        torch.relu,
        [
            lambda x: x.clamp(min=0), lambda x: torch.clamp(x, 0), lambda x: x.clip(0.0),
            lambda x: torch.clamp(x, min=torch.zeros((), dtype=x.dtype)),
            lambda x: x.clamp_min(0), lambda x: torch.clamp_min(x, 0.0),
            lambda x: F.threshold(x, 0, 0), nn.Threshold(0, 0),
            lambda x: torch.maximum(x, torch.zeros_like(x)),
            lambda x: torch.maximum(torch.zeros_like(x), x), lambda x: torch.max(x, x.new_zeros(1)),
            lambda x: x.maximum(x.new_zeros(())), lambda x: torch.fmax(x, torch.zeros_like(x)),
            lambda x: torch.where(x > 0, x, 0), lambda x: torch.where(x >= 0, x, torch.zeros_like(x)),
            lambda x: torch.where(x.gt(0), x, 0.0), lambda x: torch.where(x <= 0, 0.0, x),
            lambda x: x.where(x > 0, torch.zeros_like(x)),
            lambda x: torch.clamp(x, min=0, out=torch.empty_like(x)),
        ],
        [
            lambda x: x.clamp_(min=0), lambda x: torch.clamp_(x, 0), lambda x: x.clamp_min_(0),
            lambda x: torch.threshold_(x, 0.0, 0.0), nn.Threshold(0, 0, inplace=True),
            lambda x: torch.clamp(x, min=0, out=x),
        ],
    ),
    "relu6": (
        lambda x: x.clamp(0, 6),
        [nn.ReLU6(), F.relu6, nn.Hardtanh(0, 6), lambda x: F.hardtanh(x, 0.0, 6.0), lambda x: x.clamp(0, 6)],
        [nn.ReLU6(inplace=True), lambda x: F.relu6(x, True), lambda x: F.hardtanh_(x, 0.0, 6.0)],
    ),
    "leaky": (
        lambda x: F.leaky_relu(x, 0.1),
        [nn.LeakyReLU(0.1), lambda x: F.leaky_relu(x, 0.1)],
        [nn.LeakyReLU(0.1, inplace=True), lambda x: F.leaky_relu_(x, 0.1)],
    ),
    "prelu": (
        lambda x: F.prelu(x, _SLOPE),
        [lambda x: F.prelu(x, _SLOPE), lambda x: x.prelu(_SLOPE), lambda x: torch.prelu(x, _SLOPE)],
        [],
    ),
    "rrelu": (
        lambda x: F.rrelu(x, training=False),
        [nn.RReLU().eval(), F.rrelu, torch.rrelu],
        [nn.RReLU(inplace=True).eval(), F.rrelu_],
    ),
    "elu": (F.elu, [nn.ELU(), F.elu], [nn.ELU(inplace=True), F.elu_]),
    "selu": (F.selu, [nn.SELU(), torch.selu], [nn.SELU(inplace=True), torch.selu_]),
    "celu": (F.celu, [nn.CELU(), torch.celu], [nn.CELU(inplace=True), torch.celu_]),
    "gelu": (F.gelu, [nn.GELU(), F.gelu], []),
    "gelu tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        [nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")],
        [],
    ),
    "silu": (
        F.silu,
        [nn.SiLU(), F.silu, lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid().mul(x)],
        [nn.SiLU(inplace=True), lambda x: x.mul_(x.sigmoid())],
    ),
    "mish": (F.mish, [nn.Mish(), F.mish], [nn.Mish(inplace=True)]),
    "softplus": (F.softplus, [nn.Softplus(), F.softplus], []),
    "hardswish": (F.hardswish, [nn.Hardswish(), F.hardswish], [nn.Hardswish(inplace=True)]),
}  # fmt: skip
_FORMS = [
    pytest.param(value, form, id=f"{name}-{kind}{number}")
    for name, (value, out_of_place, in_place) in _RECTIFIERS.items()
    for kind, forms in (
        ("out", out_of_place),
        ("in", in_place),
        ("ignored", [ignores(form) for form in in_place]),
    )
    for number, form in enumerate(forms)
]


@pytest.mark.parametrize(("value", "form"), _FORMS)
def test_every_form_of_every_rectifier_is_its_definition(value: Body, form: Body) -> None:
    agree(form, lambda x: rect(x, value))
    difference = (reference(value) - reference(lambda x: rect(x, value))).abs().max()
    assert difference > 1e-3, "the plain gradient would pass too"


@pytest.mark.parametrize(
    "body",
    [
        torch.tanh, torch.sigmoid, lambda x: x.softmax(1), lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.clamp(max=0.3), F.hardtanh, lambda x: F.threshold(x, 0.1, 0.0),
        lambda x: torch.where(x > 0, x, 0.5), lambda x: torch.maximum(x, torch.full_like(x, 0.1)),
        lambda x: torch.where(x > 0.1, x, 0), lambda x: torch.where(x > 0, 2 * x, 0), torch.square,
    ],
)  # fmt: skip
def test_what_is_no_rectifier_keeps_its_local_gradient(body: Body) -> None:
    agree(body, body)


def test_a_mask_of_what_has_been_overwritten_is_no_rectifiers() -> None:
    def body(x: Tensor) -> Tensor:
        x = x.clone()
        mask = x > 0
        x.mul_(-1)
        return torch.where(mask, x, 0)

    agree(body, body)


# ---- in place, on views ------------------------------------------------------------------------


def _written(view: Callable[[Tensor], Tensor]) -> Body:
    def body(x: Tensor) -> Tensor:
        F.relu_(view(x))
        return x

    return body


def _half(x: Tensor) -> Tensor:
    return torch.cat([rect(x[:, :4]), x[:, 4:]], 1)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :4], lambda x: x.narrow(1, 0, 4), lambda x: x.chunk(2, 1)[0],
        lambda x: x.split(4, 1)[0], lambda x: torch.split(x, [4, 4], 1)[0],
        lambda x: x.tensor_split(2, 1)[0], lambda x: torch.chunk(x, chunks=2, dim=1)[0],
        lambda x: x.view(2, 2, 4, 6, 6).unbind(1)[0], lambda x: x[:, :4].flatten(2).view(2, 4, 36),
    ],
)  # fmt: skip
def test_in_place_on_a_view_reaches_the_tensor_behind_it(view: Callable[[Tensor], Tensor]) -> None:
    agree(_written(view), _half)


def test_what_a_module_overwrites_in_place_is_the_convolutions_output() -> None:
    """The layer is the convolution: an in-place ReLU behind it must not become the layer."""
    first = nn.Conv2d(3, 4, 3).double()
    net, x = nn.Sequential(first, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3).double()), images()
    recording = recorded(net, x, "0")
    torch.testing.assert_close(recording.outputs["0"], first(x).detach())
    seed = -torch.ones_like(recording.outputs["0"])
    expected = F.conv_transpose2d(seed, first.weight)
    torch.testing.assert_close(recording.walk("0", seed)[0], expected.detach())


def test_an_input_written_in_place_is_the_users_no_more() -> None:
    x = images()
    before = x.clone()
    last = nn.Conv2d(3, 4, 3).double()
    net = nn.Sequential(nn.ReLU(inplace=True), last)
    recording = recorded(net, x, "1")
    signal = recording.walk("1", recording.outputs["1"])[0]
    expected = F.conv_transpose2d(recording.outputs["1"], last.weight.detach()).relu()
    torch.testing.assert_close(signal, expected)
    assert torch.equal(x, before)


def test_what_autograd_saved_may_be_overwritten() -> None:
    """Legal in a model that never trains; plain autograd refuses it."""
    scale = torch.linspace(0.5, 2, 8, dtype=torch.float64).view(8, 1, 1).requires_grad_()

    def body(x: Tensor) -> Tensor:
        early = torch.tanh(x) * scale
        tanh = torch.tanh(x)
        late = tanh + 0
        tanh.mul_(3)
        F.relu_(x)
        return early + late + tanh + x

    def expected(x: Tensor) -> Tensor:
        return torch.tanh(x) * scale + 4 * torch.tanh(x) + rect(x)

    agree(body, expected)


# ---- Captum's answer, ours and the reference side by side --------------------------------------


class Wired(nn.Module):
    def __init__(self, wiring: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wiring = wiring
        self.first, self.side = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.second = nn.ReLU(), nn.ReLU()
        self.last = nn.Conv2d(8, 4, 3, padding=1)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.wired(self.first(x), self.relu, self.second)

    def wired(self, y: Tensor, relu: Body, second: Body) -> Tensor:
        if self.wiring == "skip from before the relu":
            return self.last(relu(y) + y)
        if self.wiring == "two relus read one tensor":
            return self.last(self.side(relu(y)) - self.other(second(y)))
        if self.wiring == "one relu serves two branches":
            a, b = self.side(y), self.other(y)
            return self.last(relu(a) - relu(b))
        if self.wiring == "one relu, branches of two shapes":
            a, b = self.side(y), F.avg_pool2d(self.other(y), 2)
            return self.last(relu(a) + F.interpolate(relu(b), scale_factor=2.0))
        if self.wiring == "two consumers":
            z = relu(y)
            return self.last(self.side(z) + self.other(z))
        assert self.wiring == "one relu in sequence"
        return self.last(relu(self.side(relu(y))))


@pytest.mark.parametrize(
    ("wiring", "captum_is_right"),
    [
        ("skip from before the relu", False),
        ("two relus read one tensor", False),
        ("one relu serves two branches", False),
        ("one relu, branches of two shapes", None),
        ("two consumers", True),
        ("one relu in sequence", True),
    ],
)
def test_wirings_side_by_side_with_captum(wiring: str, captum_is_right: bool | None) -> None:
    net, x, unit = Wired(wiring), images(), (1, 2, 3)
    recording = recorded(net, x)
    seed = torch.zeros_like(recording.outputs["last"])
    seed[:, unit[0], unit[1], unit[2]] = 1
    given = recording.walk("last", seed)[0]

    leaf = x.clone().requires_grad_()
    out = net.wired(net.first(leaf), rect, rect)
    (expected,) = torch.autograd.grad(out, leaf, seed)
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captum = NeuronDeconvolution(net, net.last)
        if captum_is_right is None:
            with pytest.raises(RuntimeError):
                captum.attribute(x.clone(), unit)
            return
        found = captum.attribute(x.clone(), unit)
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < 1e-12 if captum_is_right else error > 0.1

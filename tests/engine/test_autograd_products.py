"""The autograd walk: gates, ambiguous products, and normalisations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from lit_deconv import Deconvnet
from lit_deconv.engine.errors import AmbiguousProduct, UnsupportedOp

from .explicit import Body, Net, agree, images, ours, recorded

# ---- gates ------------------------------------------------------------------------------------


def _squeezed(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


_OFFSETS = nn.Conv2d(8, 18, 3, padding=1).double()
_KERNEL = torch.linspace(-1, 1, 8 * 72, dtype=torch.float64).view(8, 8, 3, 3)


def _overwritten_since(x: Tensor) -> Tensor:
    x = x * 1
    gate = torch.sigmoid(x)
    return x.neg_() * gate


def _gate_overwritten(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x[:, :1]).repeat(1, 8, 1, 1)
    gate.mul_(x)  # what it returns is not used
    return gate


_GATED: list[tuple[str, Body, Body]] = [
    (
        "squeeze and excite",
        lambda x: x * torch.sigmoid(_squeezed(x)),
        lambda x: x * torch.sigmoid(_squeezed(x)).detach(),
    ),
    (
        "broadcast alone",
        lambda x: x * torch.tanh(_squeezed(x)),
        lambda x: x * torch.tanh(_squeezed(x)).detach(),
    ),
    (
        "broadcast by expand",
        lambda x: torch.tanh(_squeezed(x)).expand_as(x) * x,
        lambda x: x * torch.tanh(_squeezed(x)).detach(),
    ),
    (
        "hard sigmoid over the map",
        lambda x: F.hardsigmoid(x[:, :1]) * x,
        lambda x: x * F.hardsigmoid(x[:, :1]).detach(),
    ),
    (
        "through views",
        lambda x: x * torch.sigmoid(x.mean((2, 3))).view(2, 8, 1, 1).expand(2, 8, 6, 6),
        lambda x: x * torch.sigmoid(x.mean((2, 3))).view(2, 8, 1, 1).detach(),
    ),
    (
        "through permute, unsqueeze and slice",
        lambda x: x * torch.sigmoid(x.permute(2, 3, 0, 1)).permute(2, 3, 0, 1)[:, :1],
        lambda x: x * torch.sigmoid(x[:, :1]).detach(),
    ),
    (
        "through chunk",
        lambda x: x[:, :4] * torch.sigmoid(x).chunk(2, 1)[1],
        lambda x: x[:, :4] * torch.sigmoid(x[:, 4:]).detach(),
    ),
    (
        "softmax over the map",
        lambda x: x * x[:, :1].flatten(2).softmax(2).view(2, 1, 6, 6),
        lambda x: x * x[:, :1].flatten(2).softmax(2).view(2, 1, 6, 6).detach(),
    ),
    (
        "in place on the map",
        lambda x: x.mul_(torch.sigmoid(_squeezed(x))),
        lambda x: x * torch.sigmoid(_squeezed(x)).detach(),
    ),
    (
        "in place on the gate",
        lambda x: torch.sigmoid(x[:, :1]).repeat(1, 8, 1, 1).mul_(x),
        lambda x: x * torch.sigmoid(x[:, :1]).detach(),
    ),
    (
        "in place on the gate, by name",
        _gate_overwritten,
        lambda x: x * torch.sigmoid(x[:, :1]).detach(),
    ),
    (
        "sigmoid of what was overwritten since",
        _overwritten_since,
        lambda x: -x * torch.sigmoid(x).detach(),
    ),
    (
        "sigmoid of itself turned round",
        lambda x: x * torch.sigmoid(x).transpose(2, 3),
        lambda x: x * torch.sigmoid(x).transpose(2, 3).detach(),
    ),
    (
        "on a map of one place",
        lambda x: x + _squeezed(x) * torch.sigmoid(1 + _squeezed(x)),
        lambda x: x + _squeezed(x) * torch.sigmoid(1 + _squeezed(x)).detach(),
    ),
    (
        "glu",
        lambda x: F.glu(x, 1),
        lambda x: x[:, :4] * torch.sigmoid(x[:, 4:]).detach(),
    ),
    (
        "divided by a norm over the map",
        lambda x: x / x.norm(dim=(2, 3), keepdim=True),
        lambda x: x / x.norm(dim=(2, 3), keepdim=True).detach(),
    ),
    (
        "matrix of attention",
        lambda x: (x.flatten(2) @ x.flatten(2).mT.softmax(-1)).softmax(-1) @ x.flatten(2),
        lambda x: (
            (x.flatten(2) @ x.flatten(2).mT.softmax(-1)).softmax(-1).detach() @ x.flatten(2)
        ),
    ),
    (
        "scaled dot product attention",
        lambda x: F.scaled_dot_product_attention(x, x + 1, x),
        lambda x: F.scaled_dot_product_attention(x.detach(), x.detach() + 1, x),
    ),
    (
        "attention of one tensor to itself",
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(x.detach(), x.detach(), x),
    ),
    (
        "normalised over the channels",
        F.normalize,
        lambda x: x / x.norm(dim=1, keepdim=True).detach(),
    ),
    (
        "normalised over the map",
        lambda x: F.normalize(x.flatten(2), dim=2).view_as(x),
        lambda x: x / x.norm(dim=(2, 3), keepdim=True).detach(),
    ),
    (
        "deformed by offsets and a mask of its own",
        lambda x: deform_conv2d(x, _OFFSETS(x), _KERNEL, padding=1, mask=x[:, :1].repeat(1, 9, 1, 1)),
        lambda x: deform_conv2d(
            x, _OFFSETS(x).detach(), _KERNEL, padding=1, mask=x[:, :1].detach().repeat(1, 9, 1, 1)
        ),
    ),
    (
        "one tensor as gate and as summand",
        lambda x: (lambda gate: torch.addcmul(gate, x, gate))(torch.sigmoid(x[:, :1])),
        lambda x: torch.sigmoid(x[:, :1]) + x * torch.sigmoid(x[:, :1]).detach(),
    ),
    (
        "sampled where the input says",
        lambda x: F.grid_sample(x, torch.tanh(x[:, :2]).permute(0, 2, 3, 1), align_corners=False),
        lambda x: F.grid_sample(
            x, torch.tanh(x[:, :2]).permute(0, 2, 3, 1).detach(), align_corners=False
        ),
    ),
    (
        "einsum of a list",
        lambda x: torch.einsum("nchw,nc->nchw", [x, x.mean((2, 3)).softmax(1)]),
        lambda x: torch.einsum("nchw,nc->nchw", x, x.mean((2, 3)).softmax(1).detach()),
    ),
    (
        "convolution with filters made from the image",
        lambda x: F.conv2d(x, weight=x.mean((0, 2, 3)).view(1, 8, 1, 1).softmax(1)),
        lambda x: F.conv2d(x, x.mean((0, 2, 3)).view(1, 8, 1, 1).softmax(1).detach()),
    ),
    (
        "einsum",
        lambda x: torch.einsum("nchw,nc->nchw", x, x.mean((2, 3)).softmax(1)),
        lambda x: torch.einsum("nchw,nc->nchw", x, x.mean((2, 3)).softmax(1).detach()),
    ),
    (
        "addcmul",
        lambda x: torch.addcmul(x, x, torch.sigmoid(x[:, :1]), value=2),
        lambda x: x + 2 * x * torch.sigmoid(x[:, :1]).detach(),
    ),
]  # fmt: skip


def eight(body: Body) -> Body:
    """Repeats channels until the last convolution can take them."""
    return lambda x: (lambda y: y.flatten(2).view(2, -1, 6, 6).repeat(1, 8 // y.shape[1], 1, 1))(
        body(x)
    )


@pytest.mark.parametrize(
    ("given", "expected"), [pytest.param(g, e, id=name) for name, g, e in _GATED]
)
def test_a_gate_is_a_constant(given: Body, expected: Body) -> None:
    agree(eight(given), eight(expected))


@pytest.mark.parametrize("given", [pytest.param(g, id=name) for name, g, _ in _GATED])
def test_the_product_rule_is_there_for_the_asking(given: Body) -> None:
    agree(eight(given), eight(given), gates="gradient")
    # ... and it is something else.
    difference = ours(eight(given), gates="gradient") - ours(eight(given))
    assert difference.abs().max() > 1e-6


_AMBIGUOUS: list[Body] = [
    lambda x: x * x,
    lambda x: x * torch.tanh(x),
    lambda x: x.mul_(torch.tanh(x)),
    lambda x: torch.sigmoid(x) * torch.sigmoid(x + 1),
    lambda x: torch.sigmoid(x) * _squeezed(x),
    lambda x: x / (1 + x.abs()),
    lambda x: (x.flatten(2).mT @ x.flatten(2)).mean((1, 2)).view(2, 1, 1, 1) + x,
    lambda x: x * (2 * torch.sigmoid(x)),
    lambda x: x * F.hardsigmoid(x).mul_(2),
    lambda x: x * F.dropout(torch.sigmoid(x), 0.5, training=True),
    lambda x: x * F.hardsigmoid(x).mul_(2).view_as(x),
]


@pytest.mark.parametrize("body", _AMBIGUOUS)
def test_a_product_without_one_gate_is_refused(body: Body) -> None:
    with pytest.raises(AmbiguousProduct, match="gates='gradient'"):
        ours(body)
    agree(body, body, gates="gradient")


def test_a_product_off_the_way_does_no_harm() -> None:
    net, x = Net(lambda x: x * x), images()
    recording = recorded(net, x, "first")
    assert recording.walk("first", recording.outputs["first"])[0].abs().max() > 0


def test_a_quotient_of_one_activation_has_its_local_gradient() -> None:
    agree(F.softsign, lambda x: x / (1 + x.abs()))
    agree(nn.Softsign(), F.softsign, gates="gradient")


def test_products_with_constants_are_ordinary() -> None:
    scale = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64).view(8, 1, 1))

    def body(x: Tensor) -> Tensor:
        return 2 * x * scale * torch.tanh(scale) / scale.exp() + x * x.detach()

    agree(body, body)


# ---- normalisation ------------------------------------------------------------------------------


def test_contrast_normalisation_is_passed_through() -> None:
    def body(x: Tensor) -> Tensor:
        return F.local_response_norm(x, 3, alpha=1.0)

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return body(x)

        @staticmethod
        def backward(ctx: Any, *signal: Tensor) -> Tensor:
            return signal[0]

    agree(body, Through.apply)
    agree(nn.LocalResponseNorm(3, alpha=1.0), Through.apply)
    agree(body, body, lrn="gradient")
    agree(body, body, lrn="gradient", gates="gradient")


_W = torch.linspace(-1, 2, 8, dtype=torch.float64)


def _frozen(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    shape = (1, 8, 1, 1)
    return (x - mean.detach()) / (variance.detach() + 1e-5).sqrt() * _W.view(shape)


def _by_group(x: Tensor, groups: int) -> Tensor:
    grouped = x.view(2, groups, -1)
    mean, variance = grouped.mean(2), grouped.var(2, correction=0)
    spread = [s.repeat_interleave(8 // groups, 1).view(2, 8, 1, 1) for s in (mean, variance)]
    return _frozen(x, *spread)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (lambda x: F.group_norm(x, 2, _W), lambda x: _by_group(x, 2)),
        (lambda x: F.instance_norm(x, weight=_W), lambda x: _by_group(x, 8)),
        (
            lambda x: F.batch_norm(x, None, None, _W, training=True),
            lambda x: _frozen(
                x, x.mean((0, 2, 3), True), x.var((0, 2, 3), correction=0, keepdim=True)
            ),
        ),
        (
            lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,), _W).permute(0, 3, 1, 2),
            lambda x: _frozen(x, x.mean(1, True), x.var(1, correction=0, keepdim=True)),
        ),
        (
            lambda x: F.rms_norm(x.permute(0, 2, 3, 1), (8,), _W, 1e-5).permute(0, 3, 1, 2),
            lambda x: _frozen(x, 0 * x, x.square().mean(1, True)),
        ),
        (
            lambda x: F.batch_norm(x, _W, _W.abs() + 1, _W),
            lambda x: _frozen(x, _W.view(1, 8, 1, 1), (_W.abs() + 1).view(1, 8, 1, 1)),
        ),
    ],
)
def test_statistics_of_a_normalisation_are_constants(given: Body, expected: Body) -> None:
    torch.testing.assert_close(
        given(torch.ones(2, 8, 6, 6).double() * _W.view(8, 1, 1)),
        expected(torch.ones(2, 8, 6, 6).double() * _W.view(8, 1, 1)),
    )
    agree(given, expected)
    agree(given, given, gates="gradient")


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.InstanceNorm2d(8), nn.LayerNorm((6, 6))])
def test_what_a_normalisation_returns_may_be_overwritten(norm: nn.Module) -> None:
    norm.double()

    def in_place(x: Tensor) -> Tensor:
        y = norm(x)
        F.leaky_relu_(y)
        return y

    given, expected = ours(in_place), ours(lambda x: F.leaky_relu(norm(x)))
    torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


_NORMALISATIONS: dict[str, Body] = {
    "group": lambda x: F.group_norm(x, 2, _W),
    "instance": lambda x: F.instance_norm(x, weight=_W),
    "layer": lambda x: F.layer_norm(x, (6, 6)),
    "rms": lambda x: F.rms_norm(x, (6, 6)),
    "batch": lambda x: F.batch_norm(x, None, None, _W, training=True),
    "glu": lambda x: F.glu(x, 1).repeat(1, 2, 1, 1),
    "divided by a norm": lambda x: x / x.norm(dim=(2, 3), keepdim=True),
    "divided by a gate": lambda x: x / torch.sigmoid(x[:, :1]),
    "swish by hand": lambda x: x * torch.sigmoid(x),
    "squeeze and excite": lambda x: x * torch.sigmoid(_squeezed(x)),
    "attention": lambda x: x * torch.softmax(x, 1),
    "contrast normalisation": lambda x: F.local_response_norm(x, 3, alpha=1.0),
}


@pytest.mark.parametrize("gates", ["constant", "gradient"])
@pytest.mark.parametrize("name", _NORMALISATIONS)
def test_rules_mean_the_same_by_gates_or_leave_it_to_autograd(name: str, gates: Any) -> None:
    net, x = Net(_NORMALISATIONS[name]), images()
    expected = ours(_NORMALISATIONS[name], gates=gates)
    given = Deconvnet(net, "last", gates=gates).attribute(x)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)
    try:
        by_rules = Deconvnet(net, "last", path="rules", gates=gates).attribute(x)
    except UnsupportedOp:
        assert Deconvnet(net, "last", gates=gates).explain(x).path == "autograd"
    else:
        torch.testing.assert_close(by_rules, expected, rtol=1e-10, atol=1e-12)


def test_a_product_with_memory_that_the_tape_lost_goes_to_autograd() -> None:
    def body(x: Tensor) -> Tensor:
        part = x[:, :4]
        x.mul_(2)
        return torch.cat([part * torch.sigmoid(x[:, :1]), part + part], 1)

    expected = ours(body)
    net = Deconvnet(Net(body), "last")
    torch.testing.assert_close(net.attribute(images()), expected, rtol=1e-12, atol=1e-12)
    assert net.explain(images()).path == "autograd"


@pytest.mark.parametrize("via", ["auto", "images", "patches"])
@pytest.mark.parametrize("crop", [False, True])
def test_a_single_unit_behind_such_a_product_is_refused_too(via: Any, crop: bool) -> None:
    net = Deconvnet(Net(lambda x: x * torch.tanh(x)), "last")
    expected = UnsupportedOp if via == "patches" else AmbiguousProduct
    with pytest.raises(expected, match=r"gates='gradient'|cannot be computed on patches"):
        net.reconstruct(images(), torch.tensor([[0, 1, 2, 2]]), crop=crop, via=via)


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: torch.stack([a, b]).prod(0),
        lambda a, b: torch.stack([a, b]).cumprod(0)[1],
        lambda a, b: torch.lerp(a, b, a.sigmoid()),
        lambda a, b: torch.special.xlogy(a, b.abs() + 1),
        lambda a, b: torch.linalg.cross(a[:, :3], b[:, :3], dim=1),
    ],
    ids=["prod", "cumprod", "lerp", "xlogy", "cross"],
)
def test_products_by_another_name_are_refused_as_well(product: Any) -> None:
    class Multiplying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(product(self.a(x), self.b(x)))

    torch.manual_seed(0)
    model, x = Multiplying(), torch.randn(1, 3, 6, 6)
    with pytest.raises(AmbiguousProduct):
        Deconvnet(model, "last").attribute(x)
    assert Deconvnet(model, "last", gates="gradient").attribute(x).abs().sum() > 0

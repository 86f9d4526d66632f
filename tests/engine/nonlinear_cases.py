"""Rectifiers, switches, gates, normalisations: the function whose Jacobian counts is written out."""

# Modules and options are chosen by name here, which types cannot follow.
# mypy: disable-error-code="attr-defined"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .definition import Case, Function

WAVE, VOLUME = (2, 4, 11), (2, 2, 4, 5, 4)


def _slope(*shape: int) -> Tensor:
    return torch.full(shape, 0.3, dtype=torch.float64)


def _ignored(call: Callable[[Tensor], Any]) -> Callable[[], Function]:
    """An in-place call whose result is not used."""

    def run(x: Tensor) -> Tensor:
        y = x * 1
        call(y)
        return y

    return lambda: run


RECTIFIERS: dict[str, Callable[[], Function]] = {
    "relu": nn.ReLU,
    "relu-in-place": lambda: nn.ReLU(inplace=True),
    "relu-F": lambda: F.relu,
    "relu-F-in-place": lambda: lambda x: F.relu(x, inplace=True),
    "relu-F_": _ignored(F.relu_),
    "relu-torch": lambda: torch.relu,
    "relu-torch_": _ignored(torch.relu_),
    "relu-method": lambda: lambda x: x.relu(),
    "relu-method_": _ignored(lambda x: x.relu_()),
    "relu6": nn.ReLU6,
    "relu6-F": lambda: F.relu6,
    "relu6-in-place": lambda: nn.ReLU6(inplace=True),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "leaky_relu-F": lambda: lambda x: F.leaky_relu(x, 0.1),
    "leaky_relu-F_": _ignored(lambda x: F.leaky_relu_(x, 0.1)),
    "leaky_relu-in-place": lambda: nn.LeakyReLU(0.2, inplace=True),
    "prelu": nn.PReLU,
    "prelu-channels": lambda: nn.PReLU(4),
    "prelu-F": lambda: lambda x: F.prelu(x, _slope(4)),
    "prelu-torch": lambda: lambda x: torch.prelu(x, _slope(1)),
    "prelu-method": lambda: lambda x: x.prelu(_slope(1)),
    "rrelu": nn.RReLU,
    "rrelu-F": lambda: F.rrelu,
    "rrelu-in-place": lambda: nn.RReLU(inplace=True),
    "elu": lambda: nn.ELU(0.7),
    "elu-F": lambda: F.elu,
    "elu-in-place": lambda: nn.ELU(inplace=True),
    "elu-F_": _ignored(F.elu_),
    "selu": nn.SELU,
    "selu-F": lambda: F.selu,
    "selu-in-place": lambda: nn.SELU(inplace=True),
    "selu-torch_": _ignored(torch.selu_),
    "celu": lambda: nn.CELU(0.5),
    "celu-F": lambda: F.celu,
    "celu-in-place": lambda: nn.CELU(inplace=True),
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU("tanh"),
    "gelu-F": lambda: F.gelu,
    "silu": nn.SiLU,
    "silu-F": lambda: F.silu,
    "silu-in-place": lambda: nn.SiLU(inplace=True),
    "silu-product": lambda: lambda x: x * torch.sigmoid(x),
    "silu-product-reversed": lambda: lambda x: x.sigmoid() * x,
    "silu-product_": lambda: lambda x: x.sigmoid().mul_(x),
    "mish": nn.Mish,
    "mish-F": lambda: F.mish,
    "mish-in-place": lambda: nn.Mish(inplace=True),
    "softplus": lambda: nn.Softplus(2, 10),
    "softplus-F": lambda: F.softplus,
    "hardswish": nn.Hardswish,
    "hardswish-F": lambda: F.hardswish,
    "hardswish-in-place": lambda: nn.Hardswish(inplace=True),
    "clamp": lambda: lambda x: x.clamp(min=0),
    "clamp-positional": lambda: lambda x: torch.clamp(x, 0),
    "clamp-float": lambda: lambda x: torch.clamp(x, min=0.0),
    "clamp-0-1": lambda: lambda x: x.clamp(0, 1),
    "clamp_": _ignored(lambda x: x.clamp_(min=0)),
    "clamp-tensor": lambda: lambda x: x.clamp(min=torch.zeros((), dtype=x.dtype)),
    "clip": lambda: lambda x: x.clip(min=0),
    "clip_": _ignored(lambda x: x.clip_(0, 6)),
    "clamp_min": lambda: lambda x: x.clamp_min(0),
    "clamp_min-torch": lambda: lambda x: torch.clamp_min(x, 0.0),
    "clamp_min_": _ignored(lambda x: x.clamp_min_(0)),
    "clamp_min-tensor": lambda: lambda x: x.clamp_min(torch.zeros((), dtype=x.dtype)),
    "hardtanh": lambda: nn.Hardtanh(0, 6),
    "hardtanh-F": lambda: lambda x: F.hardtanh(x, 0.0, 1.0),
    "hardtanh_": _ignored(lambda x: F.hardtanh_(x, 0.0, 1.0)),
    "threshold": lambda: nn.Threshold(0, 0),
    "threshold-F": lambda: lambda x: F.threshold(x, 0, 0),
    "threshold_": _ignored(lambda x: F.threshold_(x, 0, 0)),
    "where-gt": lambda: lambda x: torch.where(x > 0, x, 0.0),
    "where-ge": lambda: lambda x: torch.where(x >= 0, x, torch.zeros_like(x)),
    "where-lt": lambda: lambda x: torch.where(x < 0, torch.zeros_like(x), x),
    "where-le": lambda: lambda x: torch.where(x <= 0, 0.0, x),
    "where-reflected": lambda: lambda x: torch.where(0 < x, x, 0.0),  # noqa: SIM300
    "where-method": lambda: lambda x: x.where(x > 0, 0.0),
    "where-zero-tensor": lambda: lambda x: torch.where(x > torch.zeros_like(x), x, 0.0),
    "maximum": lambda: lambda x: torch.maximum(x, torch.zeros_like(x)),
    "maximum-reversed": lambda: lambda x: torch.maximum(torch.zeros_like(x), x),
    "maximum-scalar": lambda: lambda x: torch.maximum(x, torch.zeros((), dtype=x.dtype)),
    "max-other": lambda: lambda x: torch.max(x, torch.zeros_like(x)),
    "max-other-method": lambda: lambda x: x.max(torch.zeros((), dtype=x.dtype)),
}


# ---- what is kept constant, written out ---------------------------------------------------


def _frozen_norm(dims: Callable[[Tensor], list[int]]) -> Callable[[Function, Tensor], Function]:
    """(y - mean) / std * gamma + beta with the statistics of x, over some dimensions."""

    def frozen(layer: Function, x: Tensor) -> Function:
        mean = x.mean(dims(x), keepdim=True)
        std = (x.var(dims(x), correction=0, keepdim=True) + layer.eps).sqrt()
        return lambda y: _affine(layer, (y - mean) / std)

    return frozen


def _affine(layer: Any, y: Tensor) -> Tensor:
    weight = getattr(layer, "weight", None)
    if weight is None:
        return y
    shape = (-1, *[1] * (y.ndim - 2)) if not hasattr(layer, "normalized_shape") else weight.shape
    bias = getattr(layer, "bias", None)
    return y * weight.reshape(shape) + (0 if bias is None else bias.reshape(shape))


def _frozen_group_norm(layer: Function, x: Tensor) -> Function:
    groups = layer.num_groups

    def frozen(y: Tensor) -> Tensor:
        apart, of = x.reshape(len(x), groups, -1), y.reshape(len(y), groups, -1)
        std = (apart.var(-1, correction=0, keepdim=True) + layer.eps).sqrt()
        return _affine(layer, ((of - apart.mean(-1, keepdim=True)) / std).reshape(y.shape))

    return frozen


def _frozen_rms_norm(layer: Function, x: Tensor) -> Function:
    dims = list(range(-len(layer.normalized_shape), 0))
    eps = layer.eps or torch.finfo(x.dtype).eps
    rms = (x.square().mean(dims, keepdim=True) + eps).sqrt()
    return lambda y: _affine(layer, y / rms)


NORMS = [
    Case("batch_norm", lambda: nn.BatchNorm2d(4)),
    Case("batch_norm-plain", lambda: nn.BatchNorm2d(4, affine=False)),
    Case("batch_norm-1d", lambda: nn.BatchNorm1d(4), WAVE),
    Case("batch_norm-vectors", lambda: nn.BatchNorm1d(5), (4, 5)),
    Case("batch_norm-3d", lambda: nn.BatchNorm3d(2), VOLUME),
    Case("batch_norm-eps", lambda: nn.BatchNorm2d(4, eps=0.3)),
    Case("batch_norm-batch-statistics", lambda: nn.BatchNorm2d(4, track_running_stats=False),
         frozen=_frozen_norm(lambda x: [0, 2, 3])),
    Case("instance_norm", lambda: nn.InstanceNorm2d(4), frozen=_frozen_norm(lambda x: [2, 3])),
    Case("instance_norm-affine", lambda: nn.InstanceNorm2d(4, affine=True, eps=0.1),
         frozen=_frozen_norm(lambda x: [2, 3])),
    Case("instance_norm-1d", lambda: nn.InstanceNorm1d(4, affine=True), WAVE,
         frozen=_frozen_norm(lambda x: [2])),
    Case("instance_norm-running", lambda: nn.InstanceNorm2d(4, track_running_stats=True)),
    Case("group_norm", lambda: nn.GroupNorm(2, 4), frozen=_frozen_group_norm),
    Case("group_norm-plain", lambda: nn.GroupNorm(4, 4, affine=False), frozen=_frozen_group_norm),
    Case("group_norm-one", lambda: nn.GroupNorm(1, 4), WAVE, frozen=_frozen_group_norm),
    Case("layer_norm", lambda: nn.LayerNorm(5), frozen=_frozen_norm(lambda x: [-1])),
    Case("layer_norm-map", lambda: nn.LayerNorm([4, 6, 5]), frozen=_frozen_norm(lambda x: [1, 2, 3])),
    Case("layer_norm-plain", lambda: nn.LayerNorm([6, 5], elementwise_affine=False),
         frozen=_frozen_norm(lambda x: [2, 3])),
    Case("rms_norm", lambda: nn.RMSNorm(5), frozen=_frozen_rms_norm),
    Case("rms_norm-eps", lambda: nn.RMSNorm([6, 5], eps=0.1), frozen=_frozen_rms_norm),
    Case("local_response_norm", lambda: nn.LocalResponseNorm(3), frozen=lambda f, x: lambda y: y * 1),
    Case("local_response_norm-F", lambda: lambda x: F.local_response_norm(x, 5, 1.0, 0.75, 2.0),
         frozen=lambda f, x: lambda y: y * 1),
]  # fmt: skip

# Switches are where the forward's maxima were: autograd's own Jacobian at x is the definition.
SWITCHES = [
    Case("max_pool2d", lambda: nn.MaxPool2d(2)),
    Case("max_pool2d-overlap", lambda: nn.MaxPool2d(3, 2)),
    Case("max_pool2d-overlap-1", lambda: nn.MaxPool2d(3, 1, 1)),
    Case("max_pool2d-padding", lambda: nn.MaxPool2d(3, 2, 1)),
    Case("max_pool2d-ceil", lambda: nn.MaxPool2d(3, 2, ceil_mode=True), (2, 3, 6, 8)),
    Case("max_pool2d-ceil-padding", lambda: nn.MaxPool2d(2, 2, 1, ceil_mode=True), (2, 3, 5, 7)),
    Case("max_pool2d-dilation", lambda: nn.MaxPool2d(2, 1, 0, 3)),
    Case("max_pool2d-dilation-padding", lambda: nn.MaxPool2d(3, 2, 1, 2)),
    Case("max_pool2d-uneven", lambda: nn.MaxPool2d((3, 2), (1, 3), (1, 0), (2, 1))),
    Case("max_pool2d-stride>kernel", lambda: nn.MaxPool2d(1, 2)),
    Case("max_pool2d-gaps", lambda: nn.MaxPool2d(2, 3), (2, 3, 8, 9)),
    Case("max_pool2d->map", lambda: nn.MaxPool2d(9, 4, 4)),
    Case("max_pool2d->map-ceil", lambda: nn.MaxPool2d(8, 2, 1, ceil_mode=True)),
    Case("max_pool2d-large-kernel", lambda: nn.MaxPool2d(17, 1), (1, 1, 19, 18)),
    Case("max_pool2d-F", lambda: lambda x: F.max_pool2d(x, 3, 2, 1)),
    Case("max_pool2d-indices", lambda: lambda x: F.max_pool2d(x, 2, return_indices=True)[0]),
    Case("max_pool1d", lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), WAVE),
    Case("max_pool1d-dilation", lambda: nn.MaxPool1d(2, 1, dilation=2), WAVE),
    Case("max_pool3d", lambda: nn.MaxPool3d((2, 3, 2), 1, 1), VOLUME),
    Case("max_pool3d-ceil", lambda: nn.MaxPool3d(2, 2, ceil_mode=True), VOLUME),
    Case("adaptive_max_pool1d", lambda: nn.AdaptiveMaxPool1d(4), WAVE),
    Case("adaptive_max_pool2d", lambda: nn.AdaptiveMaxPool2d((4, 2))),
    Case("adaptive_max_pool2d-1", lambda: nn.AdaptiveMaxPool2d(1)),
    Case("adaptive_max_pool3d", lambda: nn.AdaptiveMaxPool3d((2, 3, 1)), VOLUME),
    Case("fractional_max_pool2d", lambda: nn.FractionalMaxPool2d(
        2, output_size=(3, 2), _random_samples=torch.full((2, 4, 2), 0.4, dtype=torch.float64))),
    Case("fractional_max_pool3d", lambda: nn.FractionalMaxPool3d(
        2, output_size=(2, 3, 2), _random_samples=torch.full((2, 2, 3), 0.4, dtype=torch.float64)),
        VOLUME),
    Case("max-dim", lambda: lambda x: x.max(1)[0]),
    Case("max-dim-keepdim", lambda: lambda x: x.max(-1, keepdim=True).values),
    Case("min-dim", lambda: lambda x: x.min(2)[0]),
    Case("amax", lambda: lambda x: x.amax((2, 3))),
    Case("amax-keepdim", lambda: lambda x: x.amax((2, 3), keepdim=True)),
    Case("amax-one", lambda: lambda x: x.amax(1)),
    Case("maxout", lambda: lambda x: x.view(-1, 2, 2, 6, 5).max(2)[0]),
    Case("maximum-of-two", lambda: lambda x: torch.maximum(x, x.flip(2) * 2)),
    Case("minimum-of-two", lambda: lambda x: torch.minimum(x, x.flip(3) * 2)),
    Case("minimum-0", lambda: lambda x: torch.minimum(x, torch.zeros_like(x))),
]  # fmt: skip


def _gated(make: Callable[[Tensor, Tensor], Tensor], gate: Function) -> dict[str, Any]:
    """A product with something computed from x, and the same with that held fixed."""

    def frozen(function: Function, x: Tensor) -> Function:
        kept = gate(x)
        return lambda y: make(y, kept)

    return {"make": lambda: lambda x: make(x, gate(x)), "frozen": frozen}


def _squeezed(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True) * 3


def _product(x: Tensor, gate: Tensor) -> Tensor:
    return x * gate


GATES = [
    Case("gate-sigmoid", **_gated(_product, lambda x: torch.sigmoid(x.flip(2)))),
    Case("gate-sigmoid-first", **_gated(lambda x, g: g * x, lambda x: torch.sigmoid(x * 2))),
    Case("gate-hardsigmoid", **_gated(_product, lambda x: F.hardsigmoid(x.flip(1)))),
    Case("gate-softmax", **_gated(_product, lambda x: (x * 2).softmax(1))),
    Case("gate-broadcast", **_gated(_product, _squeezed)),
    Case("gate-broadcast-first", **_gated(lambda x, g: g * x, _squeezed)),
    Case("gate-squeeze-excite", **_gated(_product, lambda x: torch.sigmoid(_squeezed(x)))),
    Case("gate-in-place", **_gated(lambda x, g: (x * 1).mul_(g), lambda x: torch.sigmoid(x + 1))),
    Case("gate-spatial", **_gated(_product, lambda x: torch.sigmoid(x.mean(1, keepdim=True)))),
    Case("gate-expanded", **_gated(
        _product, lambda x: torch.sigmoid(_squeezed(x)).expand(-1, -1, 6, 5))),
    Case("gate-split", **_gated(_product, lambda x: torch.sigmoid(torch.cat([x, x], 1)).chunk(2, 1)[1])),
    Case("gate-detached", **_gated(_product, lambda x: (x.flip(2) * 2).detach())),
    Case("gate-mask", **_gated(_product, lambda x: (x.flip(2) > 0).to(x.dtype))),
    Case("glu", lambda: nn.GLU(1), frozen=lambda f, x: (
        lambda y: y[:, :2] * torch.sigmoid(x[:, 2:]))),
    Case("glu-last", lambda: lambda x: F.glu(x, -2), frozen=lambda f, x: (
        lambda y: y[:, :, :3] * torch.sigmoid(x[:, :, 3:]))),
]  # fmt: skip

LOCAL = [
    Case("tanh", nn.Tanh), Case("tanh_", lambda: lambda x: (x * 2).tanh_()),
    Case("sigmoid", nn.Sigmoid), Case("sigmoid_", lambda: lambda x: (x * 2).sigmoid_()),
    Case("hardsigmoid", nn.Hardsigmoid), Case("logsigmoid", nn.LogSigmoid),
    Case("tanhshrink", nn.Tanhshrink),
    Case("softmax", lambda: nn.Softmax(1)), Case("softmax2d", nn.Softmax2d),
    Case("softmax-last", lambda: lambda x: x.softmax(-1)),
    Case("abs", lambda: torch.abs), Case("exp", lambda: torch.exp), Case("sin", lambda: torch.sin),
    Case("cos", lambda: torch.cos), Case("erf", lambda: torch.erf),
    Case("square", lambda: torch.square), Case("pow2", lambda: lambda x: x**2),
    Case("pow3", lambda: lambda x: x.pow(3)), Case("pow-half", lambda: lambda x: x**0.5, positive=True),
    Case("pow-in-place", lambda: lambda x: (x * 1).pow_(2)),
    Case("pow0", lambda: lambda x: (x * (x.abs() > 0.5).to(x.dtype)).pow(torch.arange(5))),
    Case("pow-of-a-number", lambda: lambda x: 2.0**x, path="autograd"),
    Case("pow-of-two", lambda: lambda x: x ** (1 + x), positive=True, path="autograd"),
    Case("log", lambda: torch.log, positive=True), Case("log1p", lambda: torch.log1p, positive=True),
    Case("sqrt", lambda: torch.sqrt, positive=True), Case("rsqrt", lambda: torch.rsqrt, positive=True),
    Case("reciprocal", lambda: torch.reciprocal, positive=True),
    Case("hardshrink", nn.Hardshrink), Case("softshrink", nn.Softshrink),
    Case("hardtanh-symmetric", nn.Hardtanh), Case("clamp-other", lambda: lambda x: x.clamp(-0.5, 1)),
    Case("clamp_max", lambda: lambda x: x.clamp_max(0.3)),
    Case("clamp-min-1", lambda: lambda x: x.clamp(min=1)),
    Case("clamp-tensors", lambda: lambda x: x.clamp(torch.full((4, 1, 1), -0.5, dtype=x.dtype), None)),
    Case("clamp-per-image", lambda: lambda x: x.clamp_(
        max=torch.arange(len(x), dtype=x.dtype).view(-1, 1, 1, 1))),
    Case("threshold-other", lambda: nn.Threshold(0.1, -2.0)),
    Case("where-mask", lambda: lambda x: torch.where(torch.arange(5) > 2, x, x * 3)),
    Case("where-own-mask", lambda: lambda x: torch.where(x.flip(2) > 0, x, x * 3)),
    Case("where-leaky", lambda: lambda x: torch.where(x > 0, x, 0.1 * x)),
    Case("where-other-zero", lambda: lambda x: torch.where(x > 0, 0.0, x)),
    Case("where-per-image", lambda: lambda x: torch.where(
        torch.arange(len(x)).view(-1, 1, 1, 1) > 0, x, x * 3)),
    Case("masked_fill", lambda: lambda x: x.masked_fill(torch.arange(5) > 2, 0.0)),
]  # fmt: skip

CASES = [*NORMS, *SWITCHES, *GATES, *LOCAL]

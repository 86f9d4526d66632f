"""Ops that are linear, or linear once their constants are: their own Jacobian is the definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .definition import Case

WAVE, VOLUME = (2, 4, 11), (2, 2, 4, 5, 4)


def _function(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: partial(_called, op, args, kwargs)


def _called(op: Callable[..., Any], args: Any, kwargs: Any, x: Tensor) -> Any:
    return op(x, *args, **kwargs)


def _constant(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# Written as f(x, constant); the constant is made when the case is, under its seed.
def _with(function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> Callable[[], Any]:
    def make() -> Any:
        constant = _constant(*shape)
        return lambda x: function(x, constant)

    return make


CONVOLUTIONS = [
    Case("conv1d", lambda: nn.Conv1d(4, 3, 3), WAVE),
    Case("conv1d-all", lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, 2), WAVE),
    Case("conv1d-transposed", lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, 1, 2, dilation=2), WAVE),
    Case("conv3d", lambda: nn.Conv3d(2, 3, 2), VOLUME),
    Case("conv3d-all", lambda: nn.Conv3d(2, 4, (2, 3, 1), (1, 2, 1), (1, 1, 0), 1, 2), VOLUME),
    Case("conv3d-transposed", lambda: nn.ConvTranspose3d(2, 3, 2, 2, 1, 1), VOLUME),
    Case("conv2d", lambda: nn.Conv2d(4, 3, 3)),
    Case("conv2d-no-bias", lambda: nn.Conv2d(4, 3, 3, bias=False)),
    Case("conv2d-1x1", lambda: nn.Conv2d(4, 7, 1)),
    Case("conv2d-padding", lambda: nn.Conv2d(4, 3, 3, padding=1)),
    Case("conv2d-padding-wide", lambda: nn.Conv2d(4, 3, 3, padding=4)),
    Case("conv2d-uneven", lambda: nn.Conv2d(4, 3, (3, 2), (2, 1), (0, 1), (1, 2))),
    Case("conv2d-stride", lambda: nn.Conv2d(4, 3, 3, stride=2, padding=1)),
    Case("conv2d-stride-rest", lambda: nn.Conv2d(4, 3, 3, stride=2), (2, 4, 6, 8)),
    Case("conv2d-stride>kernel", lambda: nn.Conv2d(4, 3, 2, stride=3), (2, 4, 7, 8)),
    Case("conv2d-few-channels", lambda: nn.Conv2d(3, 5, 7, stride=2, padding=3), (2, 3, 9, 9)),
    Case("conv2d-stride-4", lambda: nn.Conv2d(3, 3, 11, 4, 2), (2, 3, 15, 15)),
    Case("conv2d-dilation", lambda: nn.Conv2d(4, 3, 3, padding=2, dilation=2)),
    Case("conv2d-groups", lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2)),
    Case("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4)),
    Case("conv2d-same", lambda: nn.Conv2d(4, 3, 3, padding="same")),
    Case("conv2d-same-even", lambda: nn.Conv2d(4, 3, (4, 2), padding="same", dilation=(1, 2))),
    Case("conv2d-valid", lambda: nn.Conv2d(4, 3, 3, padding="valid")),
    Case("conv2d-functional-same", _with(lambda x, w: F.conv2d(x, w, padding="same"), 3, 4, 2, 3)),
    Case("conv2d-circular", lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")),
    Case("conv2d-reflect", lambda: nn.Conv2d(4, 3, 3, padding=2, padding_mode="reflect")),
    Case("conv2d-replicate", lambda: nn.Conv2d(4, 3, 3, 2, 1, padding_mode="replicate")),
    Case("conv1d-circular", lambda: nn.Conv1d(4, 3, 3, padding=2, padding_mode="circular"), WAVE),
    Case("conv1d-same", lambda: nn.Conv1d(4, 3, 4, padding="same"), WAVE),
    Case("conv2d-transposed", lambda: nn.ConvTranspose2d(4, 3, 3)),
    Case("conv2d-transposed-all", lambda: nn.ConvTranspose2d(4, 6, 3, 3, 2, 1, 2, dilation=2)),
    Case("conv2d-transposed-gap", lambda: nn.ConvTranspose2d(4, 3, 1, 2)),
    Case("conv2d-kernel-is-map", lambda: nn.Conv2d(4, 3, (6, 5))),
]

POOLS = [
    Case("avg_pool2d", lambda: nn.AvgPool2d(2)),
    Case("avg_pool2d-overlap", lambda: nn.AvgPool2d(3, 2, 1)),
    Case("avg_pool2d-ceil", lambda: nn.AvgPool2d(3, 2, ceil_mode=True)),
    Case("avg_pool2d-ceil-pad", lambda: nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True)),
    Case("avg_pool2d-no-pad-counted", lambda: nn.AvgPool2d(3, 2, 1, True, False)),
    Case("avg_pool2d-divisor", lambda: nn.AvgPool2d(3, 2, 1, divisor_override=5)),
    Case("avg_pool2d-ceil-divisor", lambda: nn.AvgPool2d(3, 2, 1, True, False, 2)),
    Case("avg_pool2d-global", lambda: nn.AvgPool2d((6, 5))),
    Case("avg_pool1d", lambda: nn.AvgPool1d(3, 2, 1, True, False), WAVE),
    Case("avg_pool3d", lambda: nn.AvgPool3d(2, 1, 1, True, False), VOLUME),
    Case("avg_pool3d-divisor", lambda: nn.AvgPool3d((1, 2, 2), divisor_override=3), VOLUME),
    Case("adaptive_avg_pool2d-1", lambda: nn.AdaptiveAvgPool2d(1)),
    Case("adaptive_avg_pool2d", lambda: nn.AdaptiveAvgPool2d((4, 2))),
    Case("adaptive_avg_pool2d-up", lambda: nn.AdaptiveAvgPool2d((7, 9))),
    Case("adaptive_avg_pool1d", lambda: nn.AdaptiveAvgPool1d(4), WAVE),
    Case("adaptive_avg_pool3d", lambda: nn.AdaptiveAvgPool3d((2, 3, 1)), VOLUME),
    Case("mean-map", _function(torch.mean, (2, 3))),
]

SUMS = [
    Case("add-constant", _function(torch.add, 2.5)),
    Case("add-tensor", _with(lambda x, c: x + c, 1, 4, 1, 1)),
    Case("add-itself", lambda: lambda x: x + x),
    Case("add-alpha", lambda: lambda x: torch.add(x, x.flip(2), alpha=3)),
    Case("add-in-place", _with(lambda x, c: x.add_(c), 4, 1, 1)),
    Case("add-broadcast", lambda: lambda x: x + x.mean((2, 3), keepdim=True)),
    Case("add-broadcast-channels", lambda: lambda x: x[:, :1] + x),
    Case("add-to-larger", _with(lambda x, c: x + c, 2, 4, 6, 5), (2, 4, 1, 1)),
    Case("sub", lambda: lambda x: x - x.flip(3)),
    Case("sub-alpha", lambda: lambda x: torch.sub(x, x.flip(3), alpha=2)),
    Case("sub-from-constant", lambda: lambda x: 1 - x),
    Case("rsub-alpha", lambda: lambda x: torch.rsub(x, x.flip(3), alpha=2)),
    Case("sub-constant-tensor", _with(lambda x, c: c - x, 4, 6, 5)),
    Case("sub-in-place", _with(lambda x, c: x.sub_(c, alpha=2), 4, 1, 1)),
    Case("neg", _function(torch.neg)),
    Case("sum", lambda: lambda x: x.sum(1, keepdim=True)),
    Case("sum-map", lambda: lambda x: x.sum((2, 3))),
    Case("sum-last", lambda: lambda x: x.sum(-1)),
    Case("mean-dims", lambda: lambda x: x.mean((-1, 1))),
    Case("mean-keepdim", lambda: lambda x: x.mean([2, 3], keepdim=True)),
    Case(
        "add-detached",
        lambda: lambda x: x + x.detach().flip(2),
        frozen=lambda f, x: lambda y: y + 0,
    ),
    Case(
        "add-detached-mean",
        lambda: lambda x: x + x.detach().mean(),
        frozen=lambda f, x: lambda y: y + 0,
    ),
]

PRODUCTS = [
    Case("mul-number", lambda: lambda x: x * -1.5),
    Case("mul-per-channel", _with(lambda x, c: x * c, 4, 1, 1)),
    Case("mul-per-channel-4d", _with(lambda x, c: c * x, 1, 4, 1, 1)),
    Case("mul-per-pixel", _with(lambda x, c: x * c, 6, 5)),
    Case("mul-per-image", _with(lambda x, c: x * c, 2, 1, 1, 1)),
    Case("mul-per-everything", _with(lambda x, c: c * x, 2, 4, 6, 5)),
    Case("mul-to-larger", _with(lambda x, c: x * c, 1, 4, 6, 5), (2, 4, 1, 1)),
    Case("mul-in-place", _with(lambda x, c: x.mul_(c), 4, 1, 1)),
    Case("mul-zero-dim", _with(lambda x, c: x * c)),
    Case("div-number", lambda: lambda x: x / 3),
    Case("div-per-channel", _with(lambda x, c: x / c, 1, 4, 1, 1)),
    Case("div-per-image", _with(lambda x, c: x / c, 2, 1, 1, 1)),
    Case("div-per-pixel", _with(lambda x, c: torch.div(x, c), 1, 1, 6, 5)),
    Case("div-in-place", lambda: lambda x: x.div_(2)),
    Case("linear", lambda: nn.Linear(5, 3), (2, 5)),
    Case("linear-no-bias", lambda: nn.Linear(5, 3, bias=False), (2, 5)),
    Case("linear-last", lambda: nn.Linear(5, 3)),
    Case("addmm", _with(lambda x, c: torch.addmm(c[0], x, c, beta=2, alpha=3), 5, 3), (2, 5)),
    Case("mm", _with(lambda x, c: x.mm(c), 5, 3), (2, 5)),
    Case("matmul-right", _with(lambda x, c: x @ c, 5, 3)),
    Case("matmul-left", _with(lambda x, c: c @ x, 3, 6)),
    Case("matmul-right-3d", _with(lambda x, c: x @ c, 11, 3), WAVE),
    Case("matmul-left-3d", _with(lambda x, c: c @ x, 3, 4), WAVE),
    Case("matmul-vector", _with(lambda x, c: x @ c, 5), path="autograd"),
    Case("einsum", _with(lambda x, c: torch.einsum("nchw,oc->nohw", x, c), 3, 4), path="autograd"),
    Case("identity", nn.Identity),
]

INTERPOLATIONS = [
    Case(f"{mode}-{'-'.join(f'{k}={v}' for k, v in kwargs.items())}",
         _function(F.interpolate, mode=mode, **kwargs), shape)
    for mode, shape, settings in (
        ("nearest", (2, 2, 4, 5), ({"scale_factor": 2}, {"size": (6, 9)}, {"size": (3, 2)},
                                   {"scale_factor": 1.3}, {"scale_factor": (0.6, 1.7)})),
        ("nearest-exact", (2, 2, 4, 5), ({"scale_factor": 2}, {"size": (6, 9)},
                                         {"scale_factor": 0.6})),
        ("bilinear", (2, 2, 4, 5), (
            {"scale_factor": 2}, {"size": (6, 9)}, {"size": (3, 2)}, {"scale_factor": 1.3},
            {"scale_factor": 1.3, "recompute_scale_factor": True},
            {"scale_factor": 2, "align_corners": True}, {"size": (6, 9), "align_corners": True},
            {"size": (2, 3), "antialias": True}, {"scale_factor": 0.6, "antialias": True})),
        ("bicubic", (2, 2, 4, 5), ({"scale_factor": 2}, {"size": (6, 3)}, {"scale_factor": 1.3},
                                   {"size": (6, 9), "align_corners": True},
                                   {"size": (2, 3), "antialias": True})),
        ("nearest", (2, 2, 7), ({"scale_factor": 2}, {"size": 5})),
        ("nearest-exact", (2, 2, 7), ({"size": 5},)),
        ("linear", (2, 2, 7), ({"scale_factor": 2}, {"size": 5, "align_corners": True})),
        ("nearest", (2, 1, 2, 3, 2), ({"scale_factor": 2},)),
        ("nearest-exact", (2, 1, 2, 3, 2), ({"size": (3, 4, 3)},)),
        ("trilinear", (2, 1, 2, 3, 2), ({"scale_factor": 2},)),
        ("area", (2, 2, 4, 5), ({"size": (2, 3)},)),
    )
    for kwargs in settings
] + [
    Case("upsample-module", lambda: nn.Upsample(scale_factor=2)),
    Case("upsampling-bilinear2d", lambda: nn.UpsamplingBilinear2d(size=(7, 6))),
]  # fmt: skip

CASES = [*CONVOLUTIONS, *POOLS, *SUMS, *PRODUCTS, *INTERPOLATIONS]

"""The adjoint identity <C x, y> = <x, C^T y>, over whatever convolutions there are."""

# Modules and options are chosen by name here, which types cannot follow.
# mypy: disable-error-code="arg-type, assignment, call-arg, misc"

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lit_deconv import Deconvnet

from .definition import seeded_with

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
MODES = st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"])


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution and the shape of an input that it takes."""
    rank = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank)))

    groups = draw(st.integers(1, 3))
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    kernel, stride, dilation, padding = sizes(1, 3), sizes(1, 3), sizes(1, 2), sizes(0, 2)
    images, map_size = draw(st.integers(1, 2)), sizes(1, 9 if rank < 3 else 5)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    if draw(st.booleans()):
        rest = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        made = TRANSPOSED[rank](
            *channels, kernel, padding=padding, output_padding=tuple(rest), **options
        )
        out = [
            (n - 1) * s - 2 * p + r + o
            for n, s, p, r, o in zip(map_size, stride, padding, reach, rest, strict=True)
        ]
        assume(min(out) > 0)
    else:
        mode = draw(MODES)
        assume(mode == "zeros" or all(p < n for p, n in zip(padding, map_size, strict=True)))
        assume(all(n + 2 * p >= r for n, p, r in zip(map_size, padding, reach, strict=True)))
        made = CONVOLUTIONS[rank](*channels, kernel, padding=padding, padding_mode=mode, **options)
    return made.double(), (images, channels[0], *map_size)


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)  # fmt: skip
@given(convolutions())
def test_adjoint_identity(example: tuple[nn.Module, tuple[int, ...]]) -> None:
    convolution, shape = example
    torch.manual_seed(0)
    nn.init.normal_(convolution.weight)
    nn.init.normal_(convolution.bias)
    net = Deconvnet(nn.Sequential(convolution), "0", path="rules")
    x = torch.randn(shape, dtype=torch.float64)
    cx = net.activations(x) - net.activations(torch.zeros_like(x))  # the bias is no part of C
    y = torch.randn_like(cx)
    back = net.attribute(x, seeded_with(y))
    assert back.shape == x.shape
    scale = (cx * y).abs().sum() + (x * back).abs().sum() + 1e-30
    assert abs((cx * y).sum() - (x * back).sum()) <= 1e-12 * scale
    # The same with every unit alone: sum over units of <x, C^T e_u y_u>.
    units = torch.cartesian_prod(*(torch.arange(size) for size in cx.shape))[
        :: max(1, cx.numel() // 7)
    ]
    alone = net.reconstruct(x, units, via="images")
    values = net.activations(x)[tuple(units.T)]
    per_unit = (alone * x[units[:, 0]]).flatten(1).sum(1)
    expected = values * cx[tuple(units.T)]
    assert torch.allclose(per_unit, expected, rtol=1e-10, atol=1e-10)

"""Forward and reverse on the patches under the units alone, exact to the border of the image.

A unit's activation depends on its receptive field only, so the ops of the tape are run again on just
that part of the image: each convolution and pool without padding on a window of its input, where
what lies outside the map is filled with what the padding would have been.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_deconv.engine.rules._shared import output
from lit_deconv.engine.rules.pooling import Switches, pooled, switch_codes
from lit_deconv.engine.rules.resampling import padding_per_dim, per_dim
from lit_deconv.engine.signal import Signal, Span, Window, seen
from lit_deconv.engine.tape import Op, Options, Tape, Value, leaves
from lit_deconv.engine.walk import on_path, walk, why_unsupported


@dataclass(frozen=True)
class Extent:
    """Which part of a map the unit at position 0 needs; that at position p needs it p * stride further.

    Attributes:
        stride: Per dimension.
        start: First index per dimension.
        size: Length per dimension.
    """

    stride: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    def union(self, other: Extent) -> Extent | None:
        """The smallest extent that holds both; None where they move at different strides."""
        if self.stride != other.stride:
            return None
        start = tuple(map(min, self.start, other.start))
        stop = tuple(map(max, self._stop, other._stop))
        return Extent(self.stride, start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    @property
    def _stop(self) -> tuple[int, ...]:
        return tuple(a + n for a, n in zip(self.start, self.size, strict=True))

    def window(self, at: Window) -> Window:
        """Its place for units whose own place is ``at``."""
        return at.replaced(stride=self.stride, shift=self.start)

    def inside(self, map_size: Sequence[int]) -> list[tuple[int, int]]:
        """First and last position per dimension from which this extent lies inside the map."""
        return [
            (-(start // stride), (whole - size - start) // stride)
            for stride, start, size, whole in zip(
                self.stride, self.start, self.size, map_size, strict=True
            )
        ]

    def seen(self, span: Span, map_size: Sequence[int]) -> list[int]:
        """Lengths of what lies inside the map of some unit with a position in ``span``; all, if not known."""
        places = seen(span, self.stride, self.start, self.size, map_size)
        return [stop - first for first, stop in places]

    def cut(self, values: Tensor, needed: Extent) -> Tensor:
        """The part ``needed`` of values that cover this extent."""
        for dim, (have, want, size) in enumerate(
            zip(self.start, needed.start, needed.size, strict=True),
            start=values.ndim - len(self.start),
        ):
            if values.shape[dim] != size:
                values = values.narrow(dim, want - have, size)
        return values


class NotLocal(Exception):
    """The layer cannot be computed from patches; says why."""


@dataclass(frozen=True)
class PatchPlan:
    """How to compute units of one layer from the patches under them.

    Attributes:
        ops: The ops on the way from the image to the layer, in forward order.
        extents: Which part of each value a unit needs.
        image: The input's value.
        target: The layer's output.
        flops: Multiply-adds of its convolutions that one unit takes forward.
        recorded: All ops of the tape, for values know the op that made them but do not hold it.
    """

    ops: list[Op]
    extents: Mapping[Value, Extent]
    image: Value
    target: Value
    flops: int
    recorded: list[Op]

    @property
    def size(self) -> tuple[int, ...]:
        """Size of a patch."""
        return self.extents[self.image].size

    def interior(self) -> tuple[tuple[int, int], ...]:
        """First and last position per dimension whose unit sees nothing outside any map."""
        limits = [
            extent.inside(value.map_size)
            for value, extent in self.extents.items()
            if value is not self.target
        ]
        return tuple(
            (max(low for low, _ in bounds), min(high for _, high in bounds))
            for bounds in zip(*limits, strict=True)
        )

    def cut(self, images: Tensor, samples: Tensor, at: Window) -> Tensor:
        """Cuts the patches out of their images.

        Args:
            images: [N, C, *map].
            samples: int64 [U].
            at: The units' places in the layer.

        Returns:
            [U, C, *patch]; 0 where a patch reaches past the image.
        """
        frame = images.new_empty(1).expand(len(samples), images.shape[1], *self.size)
        signal = Signal(frame, samples, self.extents[self.image].window(at))
        return signal.replaced(values=signal.of_window(images)).clipped(images.shape[2:]).values

    def forward(self, patches: Tensor, at: Window) -> tuple[Tensor, Tape]:
        """Runs the layer on patches.

        Args:
            patches: [U, C, *patch].
            at: The units' places in the layer.

        Returns:
            All channels of each unit's place, [U, C], and the tape for ``reverse``.
        """
        values: dict[Value, Tensor] = {self.image: patches}
        tape = Tape(inputs=[self.image], samples=self.image.shape[0], device=patches.device)
        for op in self.ops:
            result, kept = _run(op, values, self.extents, at)
            values.update(result)
            tape.ops.append(replace(op, kept=kept))
        return values[self.target].flatten(1), tape

    def reverse(
        self, tape: Tape, activation: Tensor, channels: Tensor, at: Window
    ) -> Signal | None:
        """Walks units back to their patches.

        Args:
            tape: What ``forward`` recorded.
            activation: [U], the value each unit starts with.
            channels: int64 [U].
            at: The units' places in the layer.

        Returns:
            The signal at the image, its windows inside the patches.
        """
        values = activation.view(-1, 1, *[1] * at.position.shape[1])
        seed = Signal(values, None, self.extents[self.target].window(at), channel=channels)
        # All ops were asked when this was planned.
        return walk(tape, self.target, seed, full_from=math.inf, supported=set(self.extents))[0]


def plan(tape: Tape, target: Value) -> PatchPlan:
    """Reads off a tape how to compute a layer from patches.

    Raises:
        NotLocal: An op on the way looks at the whole map, or is not known on windows.
    """
    if tape.faults:
        raise NotLocal(tape.faults[0])
    if len(tape.inputs) != 1:
        raise NotLocal("the model has several inputs")
    if target in tape.inputs:
        raise NotLocal("the layer hands the image on as it is")
    if len(target.shape) < 3:
        raise NotLocal("the layer is no feature map")
    spatial = len(target.map_size)
    ones, zeros = (1,) * spatial, (0,) * spatial
    extents: dict[Value, Extent] = {target: Extent(ones, zeros, ones)}
    ops, flops = [], 0
    path = {id(op) for op, _ in on_path(tape, target)}
    for op in reversed(tape.ops):
        used = [value for value in op.outputs if value in extents]
        if op.name == "input" or not used or used[0] is None:
            continue
        if len(used) > 1 or id(op) not in path:
            raise NotLocal(f"{op.where} is needed forward but is not on the way back")
        why = why_unsupported(op, used[0], tape.samples) or _why_not_local(op, used[0])
        if why:
            raise NotLocal(f"{op.where} {why}")
        ops.append(op)
        flops += _flops(op, extents[used[0]])
        for parent in dict.fromkeys(op.parents):
            needed = _needed(op, extents[used[0]])
            joined = extents[parent].union(needed) if parent in extents else needed
            if joined is None:
                raise NotLocal(f"{op.where} joins branches of different stride")
            extents[parent] = joined
    if tape.inputs[0] not in extents:
        raise NotLocal("the layer does not depend on the image")
    return PatchPlan(ops[::-1], extents, tape.inputs[0], target, flops, tape.ops)


def whole_flops(tape: Tape, target: Value) -> int:
    """Multiply-adds of the convolutions in front of a layer, for one image."""
    return sum(
        op["weight"].numel() * (op["input"] if op["transposed"] else value).map_size.numel()
        for op, value in on_path(tape, target)
        if op.name == "convolution"
    )


# ---- which ops ---------------------------------------------------------------------------------

_SLIDING = {"convolution", "max_pool2d_with_indices", "max_pool3d_with_indices"}
_MOVING = {"constant_pad_nd"}
_POINTWISE = {
    "relu", "relu6", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "elu", "selu", "celu", "gelu",
    "silu", "mish", "softplus", "hardswish", "clamp", "clamp_min", "hardtanh", "threshold",
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "add", "sub", "rsub",
    "neg", "mul", "div", "cat", "slice", "clone", "alias", "contiguous", "_to_copy", "dropout",
    "feature_dropout", "alpha_dropout", "local_response_norm",
}  # fmt: skip
# Of those, the ones whose tensors hold a number a channel.
_PER_CHANNEL = {
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "prelu",
    "_prelu_kernel",
}  # fmt: skip


def _why_not_local(op: Op, value: Value) -> str | None:
    assert op.rule is not None
    windows = op.rule.windows(op) if callable(op.rule.windows) else op.rule.windows
    if op.name not in _SLIDING | _MOVING | _POINTWISE or not windows:
        return "is not computed on patches"
    if op.func is None:
        return "has no function to run again"
    if op.name == "convolution" and op["transposed"]:
        return "is a transposed convolution"
    if op.name == "constant_pad_nd" and padding_per_dim(op)[0] != (0, 0):
        return "pads channels"
    if op.name == "cat" and not all(isinstance(part, Value) for part in op["tensors"]):
        return "joins a constant that is as large as the map"
    if "norm" in op.name and op.rule.before and op.kept is not None:
        return "takes its statistics from the whole batch"
    if op.name not in _SLIDING | _PER_CHANNEL:
        for constant in leaves(op.arguments.values()):
            # Broadcasting counts dimensions from the last one.
            if isinstance(constant, Tensor) and any(
                extent > 1 for extent in constant.shape[-len(value.map_size) :]
            ):
                return "has a constant that differs over the map"
            if isinstance(constant, Value) and constant.constant:
                return "has a mask made of the map"
    return None


def _needed(op: Op, extent: Extent) -> Extent:
    """The part of an op's argument that a part of its result needs."""
    spatial = len(extent.size)
    if op.name in _MOVING:
        before = [pair[0] for pair in padding_per_dim(op)[1:]]
        start = tuple(a - b for a, b in zip(extent.start, before, strict=True))
        return replace(extent, start=start)
    if op.name not in _SLIDING:
        return extent
    kernel, stride, padding, dilation = _sliding(op, spatial)
    return Extent(
        tuple(a * s for a, s in zip(extent.stride, stride, strict=True)),
        tuple(a * s - p for a, s, p in zip(extent.start, stride, padding, strict=True)),
        tuple(
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(extent.size, stride, kernel, dilation, strict=True)
        ),
    )


def _sliding(op: Op, spatial: int) -> tuple[list[int], list[int], list[int], list[int]]:
    kernel = (
        list(op["weight"].shape[2:])
        if op.name == "convolution"
        else per_dim(op["kernel_size"], spatial)
    )
    stride = per_dim(op["stride"] or kernel, spatial)
    return kernel, stride, per_dim(op["padding"], spatial), per_dim(op["dilation"], spatial)


def _flops(op: Op, extent: Extent) -> int:
    if op.name != "convolution":
        return 0
    return op["weight"].numel() * math.prod(extent.size)


# ---- one op on windows -------------------------------------------------------------------------


def _run(
    op: Op, values: Mapping[Value, Tensor], extents: Mapping[Value, Extent], at: Window
) -> tuple[dict[Value, Tensor], Any]:
    """One op on the windows of its arguments: its result and what its rule keeps of it."""
    value = output(op)
    needed = _needed(op, extents[value])

    def window_of(parent: Value) -> Tensor:
        return extents[parent].cut(values[parent], needed)

    arguments = {
        name: [window_of(v) if isinstance(v, Value) else v for v in argument]
        if isinstance(argument, (list, tuple))
        else (window_of(argument) if isinstance(argument, Value) else argument)
        for name, argument in op.arguments.items()
    }
    assert op.func is not None
    assert op.rule is not None
    if op.name in _SLIDING | _MOVING:
        return _slide(op, value, arguments, extents[value], at)
    kept = op.rule.before(op, arguments, None, Options()) if op.rule.before else None
    result = op.func(**arguments)
    if op.rule.after:
        kept = op.rule.after(op, arguments, result, Options())
    return {value: result[0] if isinstance(result, tuple) else result}, kept


def _slide(
    op: Op, value: Value, arguments: dict[str, Any], extent: Extent, at: Window
) -> tuple[dict[Value, Tensor], Any]:
    needed = _needed(op, extent)
    name = "input" if op.name == "convolution" else "self"
    parent: Value = op[name]
    fill = {"convolution": 0.0, "constant_pad_nd": op.arguments.get("value") or 0.0}
    inside, around = arguments[name], fill.get(op.name, -math.inf)
    if around or parent.op.name != "input":  # patches are cut with zeros around the image
        inside = Signal(inside, None, needed.window(at)).clipped(parent.map_size, around).values
    if op.name == "constant_pad_nd":
        return {value: inside}, None
    spatial = len(needed.size)
    if op.name == "convolution":
        return {value: _convolved(op, inside)}, None
    kernel, stride, padding, dilation = _sliding(op, spatial)
    assert op.func is not None
    inner = {**op.arguments, "self": inside, "padding": [0] * spatial, "ceil_mode": False}
    result, indices = pooled(op.func, inner)
    codes = switch_codes(indices, inside.shape[2:], kernel, stride, [0] * spatial, dilation)
    here = replace(extent, size=tuple(codes.shape[2:])).window(at)
    overlap = op.kept.overlap
    return {value: result}, Switches(codes, kernel, stride, padding, dilation, overlap, here)


def _convolved(op: Op, inside: Tensor) -> Tensor:
    """A convolution of windows, without padding."""
    weight: Tensor = op["weight"]
    spatial, groups = weight.ndim - 2, op["groups"]
    if inside.shape[1:] == weight.shape[1:]:  # one place: a product of matrices is faster
        return F.linear(inside.flatten(1), weight.flatten(1), op["bias"]).unflatten(
            1, (-1, *[1] * spatial)
        )
    return torch.ops.aten.convolution.default(
        inside, weight, op["bias"], op["stride"], [0] * spatial, op["dilation"], False,
        [0] * spatial, groups,
    )  # fmt: skip

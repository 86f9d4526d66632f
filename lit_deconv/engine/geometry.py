"""Receptive fields, read off the tape: which input pixels each unit of a layer can see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_deconv.engine.rules._shared import positive_dim
from lit_deconv.engine.rules.resampling import matrices_of, padding_per_dim, per_dim
from lit_deconv.engine.tape import Op, Tape, Value


@dataclass(frozen=True)
class Span:
    """What the units along one dimension of a layer see along one axis of a tensor.

    Attributes:
        axis: Which axis of the tensor.
        first: int64 [positions], the first index seen from each position; may lie before 0.
        last: int64 [positions], the last one, inclusive; may lie behind the end.
    """

    axis: int
    first: Tensor
    last: Tensor

    def union(self, other: Span) -> Span | None:
        """Both together, None where they run along different axes."""
        if self.axis != other.axis:
            return None
        return Span(
            self.axis,
            torch.minimum(self.first, other.first),
            torch.maximum(self.last, other.last),
        )


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive fields of a layer's units along the dimensions of the map.

    Attributes:
        size: Extent of the largest unit's field, per dimension; at most the image.
        stride: Step of the field from one unit to the next, None where it is not even.
        first: int64 [positions] per dimension: where each unit's box starts.
        whole: Per dimension, whether the field is the whole image.
    """

    size: tuple[int, ...]
    stride: tuple[int | None, ...]
    first: tuple[Tensor, ...]
    whole: tuple[bool, ...]

    def boxes(self, positions: Tensor) -> Tensor:
        """Half-open boxes around units.

        Args:
            positions: int64 [U, D].

        Returns:
            int64 [U, 2D]: the starts of all dimensions, then their ends (top, left, bottom, right).
        """
        start = torch.stack(
            [
                positions.new_zeros(len(positions))
                if self.whole[d]
                else first.to(positions.device).index_select(0, positions[:, d])
                for d, first in enumerate(self.first)
            ],
            1,
        )
        return torch.cat([start, start + start.new_tensor(self.size)], 1)


def whole_image(size: Sequence[int]) -> ReceptiveField:
    """The field of units that may see everything, or whose map is no map of the image (tokens).

    Args:
        size: Extents of the image behind samples and channels.
    """
    dims = range(len(size))
    zero = torch.zeros(1, dtype=torch.int64)
    return ReceptiveField(
        tuple(size), tuple(0 for _ in dims), tuple(zero for _ in dims), tuple(True for _ in dims)
    )


def receptive_field(tape: Tape, target: Value, image: Value | None = None) -> ReceptiveField:
    """The receptive field of every unit of a value, branches joined.

    A box counts what a unit depends on, gates and other constants included; where an op in front of
    it is global (adaptive pooling, attention, statistics over the map), that is the whole image.

    Args:
        tape: The recording.
        target: The layer's output, [N, C, *map].
        image: The input meant; the first one by default.
    """
    image = image or tape.inputs[0]
    spans: dict[Value, list[Span | None]] = {
        target: [
            Span(2 + dim, torch.arange(extent), torch.arange(extent))
            for dim, extent in enumerate(target.map_size)
        ]
    }
    for op in reversed(tape.ops):
        for output in op.outputs:
            if output not in spans or op.name == "input" or output is None:
                continue
            here = spans.pop(output)
            for parent in dict.fromkeys(op.parents):
                seen = [_through(op, output, parent, span) for span in here]
                spans[parent] = (
                    [_joined(a, b) for a, b in zip(spans[parent], seen, strict=True)]
                    if parent in spans
                    else seen
                )
    return _at_image(spans.get(image), target, image)


def _joined(one: Span | None, other: Span | None) -> Span | None:
    return None if one is None or other is None else one.union(other)


def _at_image(spans: list[Span | None] | None, target: Value, image: Value) -> ReceptiveField:
    if len(target.map_size) != len(image.map_size):
        return whole_image(image.map_size)
    sizes, strides, firsts, wholes = [], [], [], []
    for dim, extent in enumerate(target.map_size):
        whole = image.map_size[dim]
        span = spans[dim] if spans is not None else None
        size = int((span.last - span.first).max()) + 1 if span is not None and extent else whole
        if span is None or span.axis != 2 + dim or size > whole:
            sizes.append(whole)
            strides.append(0 if span is None else None)
            firsts.append(torch.zeros(extent, dtype=torch.int64))
            wholes.append(True)
            continue
        steps = span.first.diff().unique()
        sizes.append(size)
        strides.append(int(steps[0]) if len(steps) == 1 else (1 if extent == 1 else None))
        firsts.append(span.first)
        wholes.append(False)
    return ReceptiveField(tuple(sizes), tuple(strides), tuple(firsts), tuple(wholes))


# ---- what one op does to a span ----------------------------------------------------------------


def _through(op: Op, output: Value, parent: Value, span: Span | None) -> Span | None:
    """The span at a parent of an op, None for all of it."""
    if span is None:
        return None
    rule = _SPANS.get(op.name)
    if rule is not None:
        return rule(op, parent, span)
    return _pointwise(op, parent, span, output) if _stays_in_place(op) else None


def _stays_in_place(op: Op) -> bool:
    """Whether an op without a rule here works place by place where it keeps its output's shape."""
    if op.rule is None:
        return False
    # A user's rule does not say what its op sees, unless it takes windows as they are.
    ours = op.rule.reverse.__module__.startswith("lit_deconv.")
    return ours or op.rule.windows is True


def _pointwise(op: Op, parent: Value, span: Span, output: Value) -> Span | None:
    """The same place, for every op that keeps its output's shape; all of the map for any other."""
    lead = len(output.shape) - len(parent.shape)
    axis = span.axis - lead
    if lead < 0:
        return None
    same = all(
        size in (1, whole)
        for size, whole in zip(parent.shape[1:], output.shape[lead + 1 :], strict=True)
    )
    if axis < 1 or not same:
        return None
    if parent.shape[axis] == 1 and output.shape[span.axis] != 1:
        return Span(axis, torch.zeros_like(span.first), torch.zeros_like(span.last))
    return Span(axis, span.first, span.last)


def _sliding(op: Op, parent: Value, span: Span) -> Span | None:
    dim, spatial = span.axis - 2, len(parent.shape) - 2
    if dim < 0:
        return None
    kernel = (
        list(op["weight"].shape[2:])
        if "weight" in op.arguments
        else per_dim(op["kernel_size"], spatial)
    )[dim]
    stride = per_dim(op["stride"] or op["kernel_size"], spatial)[dim]
    padding = per_dim(op["padding"], spatial)[dim]
    dilation = per_dim(op.arguments.get("dilation", 1), spatial)[dim]
    reach = (kernel - 1) * dilation
    if op.arguments.get("transposed"):
        first = -((reach - padding - span.first) // stride)
        return Span(span.axis, first, (span.last + padding).div(stride, rounding_mode="floor"))
    return Span(span.axis, span.first * stride - padding, span.last * stride - padding + reach)


def _padded(op: Op, parent: Value, span: Span) -> Span | None:
    before, _ = padding_per_dim(op)[span.axis - 1]
    first, last = span.first - before, span.last - before
    if op.name == "constant_pad_nd":
        return Span(span.axis, first, last)
    # Copies of the border (or of the other side) show pixels that lie elsewhere.
    end = parent.shape[span.axis] - 1
    if bool((first >= 0).all() & (last <= end).all()):
        return Span(span.axis, first, last)
    if op.name.startswith("replication"):
        return Span(span.axis, first.clamp(0, end), last.clamp(0, end))
    if op.name.startswith("reflection"):
        mirrored = (
            torch.where(first < 0, -first, last),
            torch.where(last > end, 2 * end - last, first),
        )
        return Span(
            span.axis,
            torch.minimum(first.clamp(min=0), mirrored[1]).clamp(min=0),
            torch.maximum(last.clamp(max=end), mirrored[0]).clamp(max=end),
        )
    return None


def _looked_up(op: Op, parent: Value, span: Span) -> Span | None:
    """Interpolation and adaptive pooling: what the op does to a ramp of indicators tells who sees whom."""
    length = parent.shape[span.axis]
    if parent.shape[span.axis] == 1:
        return Span(span.axis, torch.zeros_like(span.first), torch.zeros_like(span.last))
    seen = matrices_of(op, torch.empty(0))[span.axis - 2] != 0  # [in, out]
    first = seen.to(torch.uint8).argmax(0)
    last = length - 1 - seen.flip(0).to(torch.uint8).argmax(0)
    end = len(first) - 1
    return Span(span.axis, first[span.first.clamp(0, end)], last[span.last.clamp(0, end)])


def _permuted(op: Op, parent: Value, span: Span) -> Span | None:
    ndim = len(parent.shape)
    if op.name == "transpose":
        order = list(range(ndim))
        one, two = positive_dim(op["dim0"], ndim), positive_dim(op["dim1"], ndim)
        order[one], order[two] = order[two], order[one]
    else:
        order = [positive_dim(dim, ndim) for dim in op["dims"]]
    return Span(order[span.axis], span.first, span.last)


def _sliced(op: Op, parent: Value, span: Span) -> Span | None:
    dim = positive_dim(op["dim"], len(parent.shape))
    if dim != span.axis:
        return span
    start, _, step = slice(op["start"], op["end"], op["step"]).indices(parent.shape[dim])
    return Span(span.axis, span.first * step + start, span.last * step + start)


def _along_other_axis(op: Op, parent: Value, span: Span) -> Span | None:
    """Ops along one dimension leave the others as they are."""
    if "dim" not in op.arguments or op["dim"] is None:
        return None
    dims = op["dim"] if isinstance(op["dim"], (list, tuple)) else [op["dim"]]
    positive = [positive_dim(dim, len(parent.shape)) for dim in dims]
    return None if span.axis in positive or not _keeps_rank(op, parent) else span


def _keeps_rank(op: Op, parent: Value) -> bool:
    output = next(value for value in op.outputs if value is not None)
    return len(output.shape) == len(parent.shape)


def _over_last(op: Op, parent: Value, span: Span) -> Span | None:
    """Linear maps and layer norm work along the last dimensions."""
    count = len(op["normalized_shape"]) if "normalized_shape" in op.arguments else 1
    return span if span.axis < len(parent.shape) - count else None


def _whole(op: Op, parent: Value, span: Span) -> Span | None:
    return None


def _batch_norm(op: Op, parent: Value, span: Span) -> Span | None:
    """In place with stored statistics; statistics of the input see all of it."""
    stored = not op.arguments.get("training") and op["running_var"] is not None
    return span if stored else None


def _reshape(op: Op, parent: Value, span: Span) -> Span | None:
    """A reshape that only regroups the dimensions in front of the map, such as a channel shuffle."""
    output = next(value for value in op.outputs if value is not None)
    behind = len(output.shape) - span.axis
    axis = len(parent.shape) - behind
    tail = slice(-behind, None)
    return (
        Span(axis, span.first, span.last)
        if (axis >= 1 and output.shape[tail] == parent.shape[tail])
        else None
    )


_SPANS: dict[str, Callable[[Op, Value, Span], Span | None]] = {
    **dict.fromkeys(
        ["convolution", "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d_with_indices",
         "max_pool2d_with_indices", "max_pool3d_with_indices"],
        _sliding,
    ),
    **dict.fromkeys(
        ["constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d",
         "replication_pad1d", "replication_pad2d", "replication_pad3d", "_pad_circular"],
        _padded,
    ),
    **dict.fromkeys(
        ["adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
         "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest1d",
         "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
         "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
         "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
         "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"],
        _looked_up,
    ),
    **dict.fromkeys(["permute", "transpose"], _permuted),
    "slice": _sliced,
    **dict.fromkeys(
        ["view", "view_as", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze"], _reshape
    ),
    **dict.fromkeys(
        ["cat", "split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_split_with_sizes",
         "unsafe_chunk", "index_select", "_softmax", "glu", "mean", "sum", "amax", "amin", "max",
         "min", "cumsum", "gather"],
        _along_other_axis,
    ),
    **dict.fromkeys(["linear", "native_layer_norm", "rms_norm"], _over_last),
    **dict.fromkeys(
        ["batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training",
         "cudnn_batch_norm"],
        _batch_norm,
    ),
    **dict.fromkeys(
        ["instance_norm", "native_group_norm", "mm", "matmul", "bmm", "addmm", "flip", "roll",
         "select", "unbind", "stack", "adaptive_max_pool2d", "pixel_shuffle", "pixel_unshuffle",
         "index", "unfold", "im2col", "col2im", "rot90", "repeat", "max_unpool2d", "max_unpool3d",
         "grid_sampler", "grid_sampler_2d", "grid_sampler_3d"],
        _whole,
    ),
}  # fmt: skip

"""Normalisation layers, each with its statistics frozen: a scale per channel, group or position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.errors import refusal
from lit_deconv.engine.registry import reverse_rule
from lit_deconv.engine.rules._shared import working_dtype
from lit_deconv.engine.rules.shared_work import constant_of
from lit_deconv.engine.signal import Signal
from lit_deconv.engine.tape import Op, Options


def _keeps_statistics(op: Op, options: Options) -> None:
    """Refuses what gates="gradient" asks: statistics multiply the activation like a gate."""
    if options.gates == "gradient":
        raise refusal(op, "has the gradient of its statistics in autograd alone")


def _uses_batch(op: Op) -> bool:
    return bool(op.arguments.get("training")) or op["running_var"] is None


def _keep_batch_variance(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    if not _uses_batch(op):
        return None
    _keeps_statistics(op, options)
    x = tensors["input"]
    return x.var([dim for dim in range(x.ndim) if dim != 1], correction=0)


@reverse_rule(
    "batch_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    of="input", before=_keep_batch_variance, windows=True, one_hot=True,
)  # fmt: skip
def batch_norm(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Signal * gamma / sqrt(var + eps)."""
    scale = constant_of(op, lambda: _batch_scale(op, working_dtype(signal.values)))
    scale = scale.to(signal.values.dtype)
    if signal.channel is not None:
        scale = scale[signal.channel].unsqueeze(1)  # [U, 1]
    scale = scale.view(*scale.shape, *[1] * (signal.values.ndim - 2))
    scaled = signal.values.mul_(scale) if signal.owned else signal.values * scale
    yield op["input"], signal.anew(scaled)


def _batch_scale(op: Op, dtype: torch.dtype) -> Tensor:
    variance = op["running_var"] if op.kept is None else op.kept
    eps = op.arguments.get("eps", op.arguments.get("epsilon"))
    scale = (variance.to(dtype) + eps).rsqrt()
    return scale if op["weight"] is None else scale * op["weight"].to(dtype)


def _along_channels(scale: Tensor, values: Tensor) -> Tensor:
    return scale.to(values.dtype).view(-1, *[1] * (values.ndim - 2))


def _keep_instance_scale(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    x = tensors["input"]
    dtype = working_dtype(x)
    if op["use_input_stats"]:
        _keeps_statistics(op, options)
        variance = x.to(dtype).var(list(range(2, x.ndim)), correction=0, keepdim=True)
    else:
        variance = _along_channels(op["running_var"].to(dtype), x).unsqueeze(0)
    scale = (variance + op["eps"]).rsqrt()
    if op["weight"] is not None:
        scale = scale * _along_channels(op["weight"].to(dtype), x)
    return scale.to(x.dtype)


@reverse_rule("instance_norm", of="input", before=_keep_instance_scale)
def instance_norm(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """The same with the statistics of each image and channel."""
    yield op["input"], signal.map(lambda values: values * signal.of(op.kept))


def _keep_rstd(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    _keeps_statistics(op, options)
    return result[2].clone()


@reverse_rule("native_layer_norm", of="input", after=_keep_rstd)
def layer_norm(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Signal * gamma / std, mean and std of each position frozen."""
    weight = op["weight"]
    rstd = signal.of(op.kept).to(signal.values.dtype)
    yield (
        op["input"],
        signal.map(
            lambda values: values * rstd * (1 if weight is None else weight.to(values.dtype))
        ),
    )


@reverse_rule("native_group_norm", of="input", after=_keep_rstd)
def group_norm(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Signal * gamma / std, mean and std of each group frozen."""
    values = signal.values
    rstd = op.kept.repeat_interleave(op["C"] // op["group"], 1).to(values.dtype)  # [N, C]
    scale = rstd if op["weight"] is None else rstd * op["weight"].to(values.dtype)
    scale = scale.view(*scale.shape, *[1] * (values.ndim - 2))
    yield op["input"], signal.map(lambda _: values * signal.of(scale))


def _keep_rms(op: Op, tensors: Mapping[str, Any], result: Any, options: Options) -> Any:
    _keeps_statistics(op, options)
    x = tensors["input"]
    dims = list(range(x.ndim - len(op["normalized_shape"]), x.ndim))
    eps = torch.finfo(x.dtype).eps if op["eps"] is None else op["eps"]
    return (x.to(working_dtype(x)).pow(2).mean(dims, keepdim=True) + eps).rsqrt().to(x.dtype)


@reverse_rule("rms_norm", of="input", before=_keep_rms)
def rms_norm(op: Op, signal: Signal) -> Iterator[tuple[Any, Signal]]:
    """Signal * gamma / rms, the rms of each position frozen."""
    weight = op["weight"]
    values = signal.values * signal.of(op.kept)
    yield op["input"], signal.map(lambda _: values if weight is None else values * weight)

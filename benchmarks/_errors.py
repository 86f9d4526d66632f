"""Errors with the same switches: rounding must not decide anew which of two equal pixels a pool took."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class SameSwitches(TorchDispatchMode):
    """Runs the model's convolutions forward in float64 and rounds their results.

    A convolution over a patch and one over the whole image round differently in float32, so where
    two pixels of a pooling window are nearly equal one takes one and the other the other. Rounded
    from float64 both see the same numbers, hence the same switches. All else stays as it is,
    the way back above all.

    Args:
        models: Their weights tell convolutions forward from those on the way back, which use
            transposed ones.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.weights = {weight.data_ptr() for model in models for weight in model.parameters()}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        transposed = 6
        if (
            func is torch.ops.aten.convolution.default
            and not args[transposed]
            and args[1].data_ptr() in self.weights
        ):
            images, weight, bias, *rest = args
            double = None if bias is None else bias.double()
            exact = func(images.double(), weight.double(), double, *rest)
            return exact.to(images.dtype)
        return func(*args, **(kwargs or {}))


def contrast_passed_on(model: nn.Module) -> nn.Module:
    """A copy in which the gradient passes contrast normalisation unchanged, as signals do in the paper.

    Captum follows its derivative; this is how the two are compared on a model that has it.
    """
    copied = copy.deepcopy(model)
    for parent in list(copied.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LocalResponseNorm):
                setattr(parent, name, _PassedOn(child))
    return copied


class _PassedOn(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, images: Tensor) -> Tensor:
        return _Identity.apply(images, self.norm)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, norm: nn.Module) -> Tensor:
        return norm(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def relative_error(ours: Tensor, reference: Tensor) -> Tensor:
    """Largest difference of each row over the largest value of the reference, [U]."""
    difference = (ours.double() - reference.double()).flatten(1).abs().amax(1)
    return difference / reference.double().flatten(1).abs().amax(1)


def in_the_image(patches: Tensor, boxes: Tensor, image_size: torch.Size) -> Tensor:
    """Patches put where their boxes say, zero around them, [U, C, H, W].

    Args:
        patches: [U, C, h, w].
        boxes: int64 [U, 4] of top, left, bottom, right.
        image_size: H and W.
    """
    height, width = image_size
    full = patches.new_zeros(len(patches), patches.shape[1], height, width)
    for row, (top, left, bottom, right) in enumerate(boxes.tolist()):
        down = slice(max(top, 0), min(bottom, height))
        along = slice(max(left, 0), min(right, width))
        inside = patches[row, :, down.start - top : down.stop - top]
        full[row, :, down, along] = inside[..., along.start - left : along.stop - left]
    return full

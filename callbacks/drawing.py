"""One layer's strongest units on the probe images, reconstructed, as the figures take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from lit_deconv.render import shift_patches

from .probe import Probe

__all__ = ["Net", "ProbedModule", "Reconstructed", "feature_map", "strongest_unit_of_each"]


class Net(Protocol):
    """What is used of `lit_deconv.Deconvnet`."""

    def reconstruct(
        self, inputs: Tensor, units: Tensor, *, crop: bool, via: Literal["auto", "images"]
    ) -> tuple[Tensor, Tensor]:
        """Patches [U, C, h, w] and boxes [U, 4]."""


class ProbedModule(nn.Module):
    """A module that takes more than images, as a function of the images alone."""

    def __init__(self, module: nn.Module, probe: Probe) -> None:
        super().__init__()
        self.module = module
        # in a closure: the engine compares a model's attributes, and these are no part of the model
        self._probe = lambda: probe

    def forward(self, images: Tensor) -> object:
        """Calls the module with the probe's other arguments."""
        probe = self._probe()
        if len(images) != len(probe) and len(probe.batched) > 1:
            raise ValueError(
                f"{len(images)} images for arguments that were given with {len(probe)}; a "
                "module whose other arguments belong to single images takes the probe as a whole"
            )
        args, kwargs = probe.arguments(images)
        return self.module(*args, **kwargs)


@dataclass(frozen=True)
class Reconstructed:
    """Units and what they project to; every tensor is on the CPU.

    Args:
        units: int64 [U, 4]: sample, channel, row, column.
        values: Their activations [U].
        patches: Reconstructions [U, C, h, w].
        boxes: Where they lie, int64 [U, 4]: top, left, bottom, right; may reach past the image.
    """

    units: Tensor
    values: Tensor
    patches: Tensor
    boxes: Tensor

    @classmethod
    def of(
        cls, net: Net, images: Tensor, activations: Tensor, units: Tensor, plain: bool
    ) -> Reconstructed:
        """Reconstruct units of a layer whose activations on these images are known."""
        # other arguments belong to whole images: patches of them would not know theirs
        via: Literal["auto", "images"] = "auto" if plain else "images"
        patches, boxes = net.reconstruct(images, units, crop=True, via=via)
        values = activations[tuple(units.T)]
        return cls(units.cpu(), values.double().cpu(), patches.cpu(), boxes.cpu())

    def __getitem__(self, which: slice) -> Reconstructed:
        return Reconstructed(
            self.units[which], self.values[which], self.patches[which], self.boxes[which]
        )

    def whole(self, height: int, width: int) -> Tensor:
        """The reconstructions on the whole image [U, C, H, W], zero outside their boxes."""
        full = self.boxes.new_tensor([[0, 0, height, width]]).expand(len(self.boxes), 4)
        return shift_patches(self.patches, self.boxes, full)

    def inside(self, height: int, width: int) -> Tensor:
        """The part of each box that lies in the image, int64 [U, 4]."""
        edges = self.boxes.new_tensor([height, width, height, width])
        return torch.minimum(self.boxes.clamp(min=0), edges)


def feature_map(output: object) -> Tensor:
    """The layer's output, if it can be drawn.

    Args:
        output: What the layer gave on the probe images.

    Returns:
        It, [N, C, H, W].

    Raises:
        ValueError: When it is no feature map, or holds values that are not finite.
    """
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.numel():
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"its output is no feature map [N, C, H, W] but {given}; choose a convolution, an "
            "activation after one, or a block of them"
        )
    finite = output.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"its activations are not finite (NaN or infinity) on {int((~finite).sum())} of "
            f"{len(output)} probe images; has the training diverged?"
        )
    return output


def strongest_unit_of_each(activations: Tensor, channels: Tensor) -> Tensor:
    """The strongest unit of each image among these channels.

    Args:
        activations: [N, C, H, W].
        channels: int64 [K].

    Returns:
        Units int64 [N, 4]: sample, channel, row, column.
    """
    count, _, height, width = activations.shape
    places = activations[:, channels].flatten(1).argmax(1)
    within = places % (height * width)
    samples = torch.arange(count, device=activations.device)
    chosen = channels[places // (height * width)]
    return torch.stack([samples, chosen, within // width, within % width], 1)

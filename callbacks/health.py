"""How a layer's channels fare: which never fire, which say the same, who has all the energy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_deconv.top import LayerTop

__all__ = ["ALIKE", "Health", "health", "table"]

ALIKE = 0.95
"""Correlation from which two channels are near-duplicates."""


@dataclass(frozen=True)
class Health:
    """One number per channel, A of them; on the CPU.

    Args:
        dead: bool [A], channels that fired on no image.
        twin: int64 [A], the lowest channel before it that is a near-duplicate; -1: there is none.
        energy: [A], share of the layer's energy (sum of squared activations).
    """

    dead: Tensor
    twin: Tensor
    energy: Tensor

    def scalars(self) -> dict[str, float]:
        """What is logged, by name."""
        return {
            "never_fires": float(self.dead.double().mean()),
            "near_duplicates": float((self.twin >= 0).double().mean()),
            "strongest_energy": float(self.energy.max()),
        }


def health(top: LayerTop, activations: Tensor) -> Health:
    """Reads dead channels off all images, what compares channels off a few.

    Args:
        top: What was collected.
        activations: The layer's maps of a few images [N, A, H, W].
    """
    maps = activations.detach().transpose(0, 1).flatten(1).float().cpu()
    squares = maps.square().sum(1).double()
    total = squares.sum()
    energy = squares / total if total > 0 else torch.zeros_like(squares)
    return Health((top.fires == 0).cpu(), twins(maps), energy)


def twins(maps: Tensor) -> Tensor:
    """The first channel before each one that correlates with it by `ALIKE` or more.

    Args:
        maps: [A, P], each channel's activations at the same P places.

    Returns:
        int64 [A], -1 where there is none; a channel that never changes has none.
    """
    centred = maps - maps.mean(1, keepdim=True)
    # after a division by the largest, so that no square leaves the range
    centred = centred / centred.abs().amax(1, keepdim=True).clamp(min=1e-30)
    norms = centred.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, centred / norms, 0)
    alike = (unit @ unit.T >= ALIKE).tril(-1)
    return torch.where(alike.any(1), alike.int().argmax(1), -1)


def table(top: LayerTop, found: Health) -> str:
    """The chosen channels' numbers in Markdown; images by data index, where that is known.

    Args:
        top: What was collected.
        found: The layer's health.
    """
    numbers = found.scalars()
    lines = [
        f"{len(found.dead)} channels over {top.images} images: "
        f"{100 * numbers['never_fires']:.3g} % never fire, "
        f"{100 * numbers['near_duplicates']:.3g} % are near-duplicates (correlation at least "
        f"{ALIKE} on the probe images), the strongest has "
        f"{100 * numbers['strongest_energy']:.3g} % of the energy there.",
        "",
        "| channel | largest activation | strongest image | fires on | energy | near-duplicate of |",
        "| ---: | ---: | ---: | ---: | ---: | :--- |",
    ]
    for row, channel in enumerate(top.channels.tolist()):
        twin, image = int(found.twin[channel]), int(top.identity[row, 0])
        is_known = image >= 0 and bool(top.exists[row, 0])
        lines.append(
            f"| {channel} | {float(top.largest[channel]):.4g} | {image if is_known else ''} | "
            f"{100 * float(top.fires[channel]):.3g} % | "
            f"{100 * float(found.energy[channel]):.3g} % | {twin if twin >= 0 else ''} |"
        )
    return "\n".join(lines)

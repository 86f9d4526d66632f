"""Reconstructions of all processes put together, and the blocks of figure 2 that come of them."""

from __future__ import annotations

from collections.abc import Sequence

from lit_deconv.render import Strongest
from lit_deconv.top import LayerTop, TopReconstructions

__all__ = ["blocks", "joined", "on_cpu"]


def joined(parts: Sequence[TopReconstructions]) -> TopReconstructions:
    """One layer's units, each from the process that holds it; on the CPU."""
    first = parts[0]
    images, patches = first.images.clone(), first.patches.clone()
    activations, verified = first.activations.clone(), first.verified.clone()
    expected = first.expected.clone()
    for part in parts[1:]:
        at = part.expected
        images[at], patches[at] = part.images[at].to(images), part.patches[at].to(patches)
        activations[at], verified[at] = part.activations[at].to(activations), part.verified[at]
        expected |= at
    return TopReconstructions(images, patches, activations, verified, expected)


def on_cpu(found: TopReconstructions) -> TopReconstructions:
    """The same, to be drawn or sent."""
    return TopReconstructions(
        found.images.cpu(),
        found.patches.cpu(),
        found.activations.cpu(),
        found.verified.cpu(),
        found.expected.cpu(),
    )


def blocks(top: LayerTop, found: TopReconstructions) -> list[Strongest]:
    """One block of figure 2 per channel; units that could not be verified are left out.

    Args:
        top: What was collected.
        found: What it projects to.
    """
    shown = []
    for row, channel in enumerate(top.channels.tolist()):
        good = found.verified[row]
        fires, broken = float(top.fires[channel]), int(top.broken[channel])
        left_out = int((top.exists[row].cpu() & ~good).sum())
        notes = [
            f"not a number on {broken} images" if broken else "",
            f"{left_out} left out" if left_out else "",
        ]
        shown.append(
            Strongest(
                channel,
                found.activations[row][good].tolist(),
                found.patches[row][good].cpu(),
                found.images[row][good].cpu(),
                fires,
                ", ".join(filter(None, notes)),
            )
        )
    return shown

"""Reconstructions of all processes put together, and the blocks of figure 2 that come of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from lit_deconv.render import Strongest
from lit_deconv.top import Examples, LayerTop, TopReconstructions

__all__ = ["Share", "blocks", "joined", "joined_examples", "on_cpu"]

T = TypeVar("T", TopReconstructions, Examples)


@dataclass(frozen=True)
class Share:
    """What one process has of one layer, on the CPU.

    Args:
        found: Its strongest units, in pixels.
        examples: Whole images of a few of them; None where none were kept.
    """

    found: TopReconstructions
    examples: Examples | None = None


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


def joined_examples(parts: Sequence[Examples | None]) -> Examples | None:
    """The strongest unit's image of each channel, from the process that has it."""
    kept = [part for part in parts if part is not None and len(part.channels)]
    if not kept:
        return None
    every = _each(Examples, lambda name: torch.cat([getattr(part, name) for part in kept]))
    best: dict[int, int] = {}
    for row, (channel, rank) in enumerate(
        zip(every.channels.tolist(), every.ranks.tolist(), strict=True)
    ):
        if channel not in best or rank < int(every.ranks[best[channel]]):
            best[channel] = row
    rows = [best[channel] for channel in sorted(best)]
    return _each(Examples, lambda name: getattr(every, name)[rows])


def on_cpu(found: TopReconstructions, examples: Examples | None) -> Share:
    """The same, to be drawn or sent."""
    return Share(
        _each(TopReconstructions, lambda name: getattr(found, name).cpu()),
        None if examples is None else _each(Examples, lambda name: getattr(examples, name).cpu()),
    )


def _each(cls: type[T], value: Callable[[str], Tensor]) -> T:
    return cls(**{each.name: value(each.name) for each in fields(cls)})


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

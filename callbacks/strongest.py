"""The strongest units of the layers over a validation that runs anyway, and what they project to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.engine.local import Layout
from lit_deconv.top import (
    MAX_BYTES,
    REDUCTIONS,
    Collector,
    LayerTop,
    SpilledImages,
    TopActivations,
    TopReconstructions,
    reconstruct_top,
)

from .peers import PeerError, Peers
from .probe import Probe, spread

__all__ = ["NOTHING", "Collection", "OneImage", "Ranking", "chosen_channels"]


NOTHING: Mapping[str, Any] = {"states": {}, "failed": {}}
"""What a process shares that saw no image."""


@dataclass(frozen=True)
class Ranking:
    """Which units are kept.

    Args:
        channels: How many channels a layer, evenly spaced; which; or all of them.
        top_k: Units a channel, at most one an image.
        max_bytes: Bound of what is kept of them in memory.
        examples: Of so many channels a layer the whole image of the strongest unit is kept.
    """

    channels: int | Sequence[int] | Literal["all"] = 16
    top_k: int = 9
    max_bytes: int = MAX_BYTES
    examples: int = 0


class OneImage(nn.Module):
    """A module that takes more than images, as a function of images alone.

    Args:
        module: The module.
        probe: Its arguments for at least one image; those of the first serve for every image.
    """

    def __init__(self, module: nn.Module, probe: Probe) -> None:
        super().__init__()
        self.module = module
        example = probe.take([0])
        # in a closure: the engine compares a model's attributes, and these are no part of the model
        self._arguments = lambda images: example.with_images(images).arguments()

    def forward(self, images: Tensor) -> object:
        """Calls the module."""
        args, kwargs = self._arguments(images)
        return self.module(*args, **kwargs)


class Collection:
    """Ranks the units of each layer while batches run, and reconstructs the strongest afterwards.

    Fed by hooks: `enter` when images go into the module that runs, `see` when a layer answers,
    `leave` when the module has. A layer that fails is left out and noted in `failed`. Made inside
    `isolated`, for it runs the module on one blank image.

    Args:
        module: The module that runs.
        layers: The chosen layers by name.
        example: Its arguments for at least one image.
        ranking: Which units are kept.
        peers: The processes that rank together.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        example: Probe,
        ranking: Ranking,
        peers: Peers | None = None,
    ) -> None:
        self.module, self.layers, self.ranking = module, layers, ranking
        self.peers = peers or Peers()
        self.failed: dict[str, Exception] = {}
        """Layers that are left out of this validation, and why."""
        self.seconds = 0.0
        """Spent in hooks since `begin`."""
        model = module if example.is_plain else OneImage(module, example)
        self._refused: dict[str, Exception] = {}
        self.nets: dict[str, Deconvnet] = {}
        """Of the layers that can be drawn, by name."""
        self._layouts: dict[str, Layout] = {}
        self.channels: dict[str, list[int]] = {}
        """Numbers of the chosen channels, by layer."""
        for name, layer in layers.items():
            try:
                net = Deconvnet(model, layer)
                (layout,) = net.layouts(example.images[:1]).values()
                if len(layout.map_size) != 2:
                    raise ValueError(
                        f"its output is no feature map [N, C, H, W] but has {len(layout.map_size)} "
                        "dimensions behind the channels; choose another layer"
                    )
                self.channels[name] = chosen_channels(layout.channels, ranking.channels)
                self.nets[name], self._layouts[name] = net, layout
            except Exception as error:
                self._refused[name] = error
        self._collector = self._new(example.images)
        self._is_open = False
        self._spilled: SpilledImages | None = None
        self.begin()

    def begin(self) -> None:
        """Forgets what was seen, before another validation."""
        self.failed, self.seconds, self._is_open = dict(self._refused), 0.0, False
        self._collector.reset()
        fits = self._collector.keeps_every_patch
        self._spilled = None if fits else SpilledImages(self._collector.device)

    def enter(
        self, images: Tensor, indices: Sequence[int] | None = None, by_hash: bool = True
    ) -> None:
        """A batch goes into the module.

        Args:
            images: [N, C, H, W].
            indices: Data index of each item of the batch, see ``Collector.begin``; left aside where
                there are as many images as items no more.
            by_hash: Whether images are known by a hash all the same.
        """
        start = time.perf_counter()
        if (images.device, images.dtype) != self._kind:
            # the next run may be on another device; what was seen on this one is over
            self._collector = self._new(images)
            self.begin()
        if indices is not None and len(indices) != len(images):
            indices = None
        self._collector.begin(images, indices, by_hash)
        self._is_open = True
        self.seconds += time.perf_counter() - start

    def see(self, name: str, output: Any) -> None:
        """A layer answers; what it answers outside the module that runs is no concern of ours."""
        if not self._is_open or name in self.failed or name not in self.nets:
            return
        start = time.perf_counter()
        try:
            net = self.nets[name]
            (inner,) = net.layers
            self._collector.see(name, net.feature_map(inner, output))
        except Exception as error:
            self.failed[name] = error
        self.seconds += time.perf_counter() - start

    def leave(self) -> None:
        """The module has answered."""
        if not self._is_open:
            return
        start = time.perf_counter()
        images, identity = self._collector.batch
        self._collector.end()
        if self._spilled is not None:
            self._spilled.update(images, identity, self._collector.winners().tolist())
        self._is_open = False
        self.seconds += time.perf_counter() - start

    def run(
        self,
        images: Probe,
        precision: tuple[str, torch.dtype] | None = None,
        indices: Sequence[int] | None = None,
        by_hash: bool = True,
    ) -> None:
        """Runs the module on images that were not seen while they ran; for use inside `isolated`.

        Args:
            images: They, with the other arguments.
            precision: Device type and dtype of the autocast that they ran under.
            indices: See ``enter``.
            by_hash: See ``enter``.
        """
        placed = [
            module.register_forward_hook(self._seeing(name)) for name, module in self.layers.items()
        ]
        device, dtype = precision or ("cpu", torch.bfloat16)
        try:
            with torch.no_grad(), torch.autocast(device, dtype, enabled=precision is not None):
                self.enter(images.images, indices, by_hash)
                args, kwargs = images.arguments()
                self.module(*args, **kwargs)
                self.leave()
        finally:
            for hook in placed:
                hook.remove()

    def share(self) -> dict[str, Any]:
        """What this process has to say to the others: counts and units, no patches."""
        states = {
            name: {state: getattr(metric, state).cpu() for state in REDUCTIONS}
            for name, metric in self._collector.metrics.items()
        }
        failed = {name: f"{type(e).__name__}: {e}" for name, e in self.failed.items()}
        return {"states": states, "failed": failed}

    def merge(self, shares: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what all processes had to say; a layer that failed in one failed in all."""
        for share in shares:
            for name, cause in share["failed"].items():
                self.failed.setdefault(name, PeerError(f"in another process: {cause}"))
        if len(shares) == 1:
            return
        for name, metric in self._collector.metrics.items():
            parts = [share["states"].get(name) for share in shares if share["states"]]
            if any(part is None for part in parts):
                self.failed.setdefault(name, PeerError("not looked at in another process"))
                continue
            for state, reduce in REDUCTIONS.items():
                stacked = torch.stack([part[state] for part in parts if part is not None])
                setattr(metric, state, reduce(stacked).to(metric.units.device))

    def compute(self) -> TopActivations:
        """The strongest units of all layers that did not fail."""
        found = self._collector.compute(self._spilled)
        for name in found:
            if name not in self.failed and not bool(found[name].exists.any()):
                self.failed[name] = ValueError(_nothing(found[name]))
        kept = {name: layer for name, layer in found.items() if name not in self.failed}
        return TopActivations(kept, found.images)

    def reconstruct(self, top: TopActivations, name: str) -> TopReconstructions:
        """Projects one layer's strongest units down; for use inside `isolated`."""
        net = self.nets[name]
        (inner,) = net.layers
        part = TopActivations({inner: top[name]}, top.images)
        return reconstruct_top(net, part, inside=True)[inner]

    def summary(self) -> str:
        """What is kept in memory, in a sentence."""
        return self._collector.summary()

    def _new(self, images: Tensor) -> Collector:
        self._kind = images.device, images.dtype
        return Collector(
            self._layouts,
            self.ranking.top_k,
            self.channels,
            images.dtype,
            images.device,
            self.ranking.max_bytes,
            self.peers.rank,
            self.ranking.examples,
            # by share and merge: in a collective of its own, one that failed would make others wait
            merges=False,
        )

    def _seeing(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.see(name, output)

        return hook


def chosen_channels(total: int, channels: int | Sequence[int] | Literal["all"]) -> list[int]:
    """Numbers of the channels that are looked at, of so many.

    Raises:
        ValueError: When one is asked for that the layer does not have.
    """
    if channels == "all":
        return list(range(total))
    if isinstance(channels, int):
        return spread(total, channels)
    numbers = [int(channel) for channel in channels]
    if max(numbers) >= total:
        raise ValueError(
            f"channel {max(numbers)} was asked for and it has {total}; choose among 0 to "
            f"{total - 1}"
        )
    return numbers


def _nothing(top: LayerTop) -> str:
    if not top.images:
        return "it did not run while images were looked at"
    return (
        f"its activations are not finite (NaN) on all of {top.images} images; has the training "
        "diverged?"
    )

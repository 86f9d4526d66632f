"""Which layers to look at: names and globs to modules, and an automatic choice.

Names are those of ``model.named_modules()`` without the segments that ``torch.compile``,
``DataParallel`` and DDP insert, so a name written for the plain model keeps its meaning.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import (
    _AdaptiveAvgPoolNd,
    _AdaptiveMaxPoolNd,
    _AvgPoolNd,
    _LPPoolNd,
    _MaxPoolNd,
)

__all__ = [
    "Kind",
    "Observation",
    "UnknownLayerError",
    "automatic",
    "kind_of",
    "named_layers",
    "resolve",
    "unwrapped",
]

Kind = Literal["activation", "conv", "pool", "block", "other"]

_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU),
    *(nn.SiLU, nn.Mish, nn.Softplus, nn.Hardswish, nn.Hardtanh, nn.Threshold, nn.Tanh),
)
_POOLS = (_MaxPoolNd, _AvgPoolNd, _LPPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd)


class UnknownLayerError(ValueError):
    """A layer that the model does not have; the message names the nearest ones."""


@dataclass(frozen=True)
class Observation:
    """What one forward pass showed of one module.

    Attributes:
        name: Dotted name.
        kind: What the module is, from ``kind_of``.
        shape: Shape of its (last) output; empty where that is no tensor.
        calls: How often it ran in this forward.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    calls: int = 1

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the output, None where it is no batch of feature maps."""
        return (self.shape[2], self.shape[3]) if len(self.shape) == 4 else None


def resolve(
    model: nn.Module, layers: str | nn.Module | Sequence[str | nn.Module] | None
) -> dict[str, nn.Module]:
    """Turn what a user wrote into modules.

    Args:
        model: The model that holds them.
        layers: An exact dotted name, a glob, a module of the model, or a sequence of these. In a
            glob ``*`` stays within one segment (``features.*``) and a segment ``**`` crosses any
            number. None gives an empty dict: the choice is left to ``automatic``.

    Returns:
        Modules by name, in the order given; those of one glob in the order of the model.

    Raises:
        UnknownLayerError: A name, glob or module that the model does not have.
        TypeError: An entry that is neither a string nor a module.
    """
    if layers is None:
        return {}
    wanted = [layers] if isinstance(layers, str | nn.Module) else list(layers)
    known = named_layers(model)
    found: dict[str, nn.Module] = {}
    for entry in wanted:
        if isinstance(entry, nn.Module):
            name = _name_of(entry, known, model)
            found[name] = known[name]
        elif isinstance(entry, str):
            names = [entry] if entry in known else _matches(entry, known)
            if not names:
                raise UnknownLayerError(_unknown(entry, known, model))
            found.update({name: known[name] for name in names})
        else:
            raise TypeError(
                f"a layer is a dotted name, a glob or a module of the model; got {entry!r} "
                f"({type(entry).__name__})"
            )
    return found


def automatic(observations: Iterable[Observation], limit: int = 5) -> list[str]:
    """Choose the last activation (else block or convolution) before each downsampling.

    A module that ran more than once in the forward has no one output and is passed over: in a
    ResNet, whose blocks reuse one ReLU, the block itself is taken.

    Args:
        observations: Modules in the order in which they returned. 1 x 1 maps (squeeze-and-excite
            gates, global pooling) are no stage of their own.
        limit: At most so many layers; of more stages, evenly spaced ones, first and last among
            them.

    Returns:
        Names in the order of the forward; empty where there is no feature map.
    """
    seen = [o for o in observations if o.name]
    # Activations between permutes (ConvNeXt) are 4-D and yet no [N, C, H, W]: only sizes that a
    # convolution or a pool made are sizes of feature maps.
    sizes = {o.size for o in seen if o.kind in ("conv", "pool") and o.size not in (None, (1, 1))}
    seen, whole = _without_strided_branches([o for o in seen if o.size in sizes])
    stages = [stage for stage in _runs(seen) if any(_has_filters(o, whole) for o in stage)]
    areas = [_area(stage[0]) for stage in stages]
    chosen: dict[tuple[int, int] | None, str] = {}
    for index, stage in enumerate(stages):
        last = index + 1 == len(stages)
        downsampled = last or areas[index + 1] < areas[index] or areas[index] == min(areas)
        # A decoder makes the sizes of its encoder come back; the encoder's layer is the one before
        # the downsampling.
        if downsampled and stage[0].size not in chosen and (name := _representative(stage)):
            chosen[stage[0].size] = name
    return _spread(list(chosen.values()), limit)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by dotted name, seen through ``torch.compile``, ``DataParallel`` and DDP.

    A module held under several names is listed under each. The model itself is not listed.
    """
    return {name: module for name, module in _walk(unwrapped(model), "", ()) if name}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile``, ``DataParallel`` or DDP wraps, else the module itself."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and isinstance(
            module, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inner = module.module
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def kind_of(module: nn.Module) -> Kind:
    """What part a module plays in the automatic choice."""
    if isinstance(module, _ACTIVATIONS):
        return "activation"
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, _POOLS):
        return "pool"
    if isinstance(module, _BatchNorm):
        return "other"
    return "block" if any(isinstance(m, _ConvNd) for m in module.modules()) else "other"


def _walk(
    module: nn.Module, prefix: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    for name, child in module._modules.items():  # named_children() would list a shared child once
        if child is None:
            continue
        child = unwrapped(child)
        if child is not module and child not in above:
            yield from _walk(child, f"{prefix}.{name}" if prefix else name, (*above, module))


def _name_of(module: nn.Module, known: dict[str, nn.Module], model: nn.Module) -> str:
    for name, candidate in known.items():
        if candidate is unwrapped(module):
            return name
    raise UnknownLayerError(
        f"the given {type(module).__name__} is no module of this "
        f"{type(unwrapped(model)).__name__}; give a module of the model itself, or its dotted name"
    )


def _matches(pattern: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if _segments_match(pattern.split("."), name.split("."))]


def _segments_match(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_segments_match(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return (
        bool(name)
        and fnmatch.fnmatchcase(name[0], pattern[0])
        and _segments_match(pattern[1:], name[1:])
    )


def _unknown(entry: str, known: dict[str, nn.Module], model: nn.Module) -> str:
    tails = [name for name in known if name.endswith(f".{entry}")]
    nearest = tails[:5] or difflib.get_close_matches(entry, known, n=5, cutoff=0.3)
    what = "no layer matches" if any(c in entry for c in "*?[") else "there is no layer"
    hint = f"nearest: {', '.join(nearest)}" if nearest else f"it has: {', '.join(list(known)[:10])}"
    return f"{what} {entry!r} in {type(unwrapped(model)).__name__}; {hint}"


def _runs(observations: Iterable[Observation]) -> list[list[Observation]]:
    runs: list[list[Observation]] = []
    for observation in observations:
        if runs and runs[-1][-1].size == observation.size:
            runs[-1].append(observation)
        else:
            runs.append([observation])
    return runs


def _without_strided_branches(
    observations: list[Observation],
) -> tuple[list[Observation], set[str]]:
    """Keep only the output of a downsampling block whose branches go back and forth in size.

    Returns:
        What is left, and the names of the blocks that stand for what ran in them.
    """
    left: list[Observation] = []
    whole: set[str] = set()
    for observation in observations:  # inner blocks return before those that hold them
        inside = [o for o in left if o.name.startswith(f"{observation.name}.")]
        areas = [_area(o) for o in inside]
        back = any(later > earlier for earlier, later in pairwise(areas))
        if observation.kind == "block" and back and _area(observation) == min(areas):
            left = [o for o in left if o not in inside]
            whole.add(observation.name)
        left.append(observation)
    return left, whole


def _has_filters(observation: Observation, whole: set[str]) -> bool:
    return observation.kind in ("activation", "conv") or observation.name in whole


def _area(observation: Observation) -> int:
    height, width = observation.size or (0, 0)
    return height * width


def _representative(stage: list[Observation]) -> str | None:
    once = [o.name for o in stage if o.calls == 1 and o.kind == "activation"]
    if not once:
        # A bottleneck's first convolution still has the old size: the block before it is finished,
        # it is not. A block that ends in a pool belongs to no stage but as its input.
        filters = [o.name for o in stage if o.kind in ("activation", "conv")]
        once = [
            o.name
            for o in stage
            if o.calls == 1
            and o.kind == "block"
            and any(name.startswith(f"{o.name}.") for name in filters)
        ]
    if not once:
        once = [o.name for o in stage if o.calls == 1 and o.kind in ("conv", "block")]
    return once[-1] if once else None


def _spread(names: list[str], limit: int) -> list[str]:
    if len(names) <= limit:
        return names
    if limit == 1:
        return names[-1:]
    return [names[round(i * (len(names) - 1) / (limit - 1))] for i in range(limit)]

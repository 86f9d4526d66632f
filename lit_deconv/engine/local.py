"""A layer's way through the model, as two images show it: what holds for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lit_deconv.engine.configuration import configuration, tensors_of
from lit_deconv.engine.geometry import ReceptiveField, receptive_field
from lit_deconv.engine.patches import NotLocal, PatchPlan, plan, whole_flops
from lit_deconv.engine.tape import Op, Tape, Value
from lit_deconv.engine.walk import on_path

# Bytes of the largest map of images that run together, where they may run apart: on a CPU so that
# what is made on the way stays in its cache, elsewhere for memory's sake.
_TOGETHER_BYTES = {"cpu": 20 << 20}
_TOGETHER_BYTES_ELSEWHERE = 1 << 30


@dataclass(frozen=True)
class Local:
    """A layer's way through the model, as a few images of this size show it.

    Attributes:
        plan: How to compute its units from patches, None where that cannot be.
        why: Why it cannot be.
        field: Its receptive fields.
        shape: Shape of its output behind the images.
        flops: Multiply-adds of the convolutions in front of it, for one image.
        largest: Numbers in the largest value on the way, for one image.
        constants: Identities of the tensors that the plan uses.
        per_image: Those among them that could hold one row an image.
    """

    plan: PatchPlan | None
    why: str
    field: ReceptiveField
    shape: torch.Size
    flops: int
    largest: int
    constants: frozenset[int]
    per_image: frozenset[int]

    def without_plan(self) -> Local:
        """The same for a model that computes constants of its own, which a few images cannot show."""
        return replace(
            self, plan=None, why="it adds or multiplies what may differ from image to image"
        )

    def cheaper(self, units: int, images: int) -> bool:
        """Whether patches take fewer operations forward than whole images; the way back is the same."""
        return self.plan is not None and units * self.plan.flops < images * self.flops


@dataclass(frozen=True)
class Layout:
    """A layer's feature maps for images of one size, known before the images are.

    Attributes:
        channels: How many feature maps.
        map_size: Their extents.
        field: Which pixels their units see.
        image: Channels and extents of one image.
        is_local: Whether units can be computed from what lies in their field alone; else it takes
            the whole image.
    """

    channels: int
    map_size: tuple[int, ...]
    field: ReceptiveField
    image: tuple[int, ...]
    is_local: bool

    @property
    def takes_image(self) -> bool:
        """Whether the whole image has to be kept to compute a unit, as patches are no smaller."""
        return not self.is_local or tuple(self.field.size) == self.image[1:]

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Extents of what has to be kept of an image to compute a unit."""
        return self.image[1:] if self.takes_image else tuple(self.field.size)


def local_way(tape: Tape, target: Value) -> Local:
    """Reads a layer's way off the tape of a few images."""
    field = receptive_field(tape, target)
    shape, flops = target.shape[1:], whole_flops(tape, target)
    values = [target, *(value for _, value in on_path(tape, target))]
    largest = max(value.shape[1:].numel() for value in values)
    try:
        found = plan(tape, target)
    except NotLocal as verdict:
        return Local(None, str(verdict), field, shape, flops, largest, frozenset(), frozenset())
    constants = frozenset(
        id(argument)
        for op in found.ops
        for argument in op.arguments.values()
        if isinstance(argument, Tensor)
    )
    per_image = frozenset(
        id(argument)
        for op in found.ops
        for name, argument in op.arguments.items()
        if isinstance(argument, Tensor)
        and name in ("self", "other")
        and argument.ndim == target_rank(op)
    )
    return Local(found, "", field, shape, flops, largest, constants, per_image)


def target_rank(op: Op) -> int:
    """Number of dimensions of what an op returned."""
    return next(len(value.shape) for value in op.outputs if value is not None)


class Ways:
    """The ways to some layers of a model by image size, kept as long as the model runs the same.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._configuration: Any = None
        self._known: dict[Any, dict[str, Local]] = {}

    def of(self, images: Tensor, read: Callable[[Tensor], Tape]) -> dict[str, Local]:
        """By layer, for images of one size; none where a few do not stand for many.

        Args:
            images: [N, C, *map].
            read: Records a forward pass of a few images.
        """
        # A model whose parts, flags or hooks have been exchanged runs other ops.
        current = configuration(self._model)
        if current != self._configuration:
            self._known.clear()
            self._configuration = current
        # Two images stand for many: a forward may do something else for a single one.
        few = images[:2]
        key = (few.shape, images.dtype, images.device)
        if key not in self._known:
            try:
                tape = read(few)
            except Exception:
                if len(images) == 1:
                    raise
                return {}  # the model may be written for one number of images only
            self._known[key] = {
                name: local_way(tape, target) for name, target in tape.layers.items()
            }
        found = self._known[key]
        state = {id(tensor) for tensor in tensors_of(self._model)}
        if not all(local.constants <= state for local in found.values()):
            # Weights that are computed anew in each forward are not those that were read.
            del self._known[key]
        return {
            name: local if local.per_image <= state else local.without_plan()
            for name, local in found.items()
        }


def runs(ways: Iterable[Local], images: Tensor) -> int:
    """In how many runs of the model to take images of which none matters to the others.

    Args:
        ways: To the layers that are wanted, all computed from patches; so the images are apart.
        images: [N, C, *map].
    """
    largest = max(way.largest for way in ways) * images.element_size()
    together = _TOGETHER_BYTES.get(images.device.type, _TOGETHER_BYTES_ELSEWHERE)
    # At least two images a run, see ``Ways``.
    return max(1, min(len(images) // 2, -(-len(images) * largest // together)))

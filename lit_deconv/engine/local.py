"""A layer's way through the model, as two images show it: what holds for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from lit_deconv.engine.configuration import configuration, modules_of, tensors_of
from lit_deconv.engine.geometry import ReceptiveField, receptive_field
from lit_deconv.engine.patches import NotLocal, PatchPlan, plan, whole_flops
from lit_deconv.engine.tape import Op, Tape, Value, leaves
from lit_deconv.engine.undisturbed import randomness_kept
from lit_deconv.engine.walk import on_path, refusals

# Bytes of the largest map of images that run together, where they may run apart. On a CPU what is made
# on the way is to stay in the cache, and below what glibc asks the system for anew each time; elsewhere
# they bound the memory.
_TOGETHER_BYTES_ELSEWHERE = 1 << 30
_TOGETHER_BYTES_ON_CPU = 20 << 20
# On a CPU about a share of what all of them would take, unless that is next to nothing.
_SHARE_OF_ALL = 4
# Less where the recordings are joined again: a run costs no more than its calls then.
_TOGETHER_BYTES_AT_LEAST, _JOINED_BYTES_AT_LEAST = 6 << 20, 3 << 19

# Image sizes whose ways are kept, the newest.
_MOST_SIZES = 8

# Images that show the way of more: what two of them show has to hold for three. Bytes of what PyTorch's own
# convolution lays out for these, up to which it is as good as its library's.
_SHOWN, _COLUMNS = 3, 2 << 20

# Of two threads that switch the library off the second would find it off, and leave it so.
_SWITCHING = RLock()


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
        exact: How many ops there are up to the last that decides by a value: those behind it may be
            rounded otherwise.
        constants: Identities of the tensors that the plan uses.
        per_image: Those among them that could hold one row an image.
    """

    plan: PatchPlan | None
    why: str
    field: ReceptiveField
    shape: torch.Size
    flops: int
    largest: int
    exact: int
    constants: frozenset[int]
    per_image: frozenset[int]

    def without_plan(self, why: str) -> Local:
        """The same for a model of which a few images do not show all."""
        return replace(self, plan=None, why=why)

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
    exact = _deciding(tape)
    try:
        refused = refusals(tape, target)
        if refused:
            op, why = refused[0]
            raise NotLocal(f"{op.where} {why}")
        found = plan(tape, target)
    except NotLocal as verdict:
        none: frozenset[int] = frozenset()
        return Local(None, str(verdict), field, shape, flops, largest, exact, none, none)
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
    return Local(found, "", field, shape, flops, largest, exact, constants, per_image)


@dataclass(frozen=True)
class Manner:
    """How a model takes images of which a few have shown all.

    Attributes:
        ops: What it records, see ``_asked``, all of which rules can reverse; a run with other ops is of
            another kind.
        runs: In how many runs the images go.
        exact: See ``Local``.
        constants: Identities of the model's tensors that the ops use.
    """

    ops: Sequence[Any]
    runs: int
    exact: int
    constants: frozenset[int]

    def holds(self, tape: Tape) -> bool:
        """Whether a run was of this kind."""
        same = _asked(tape.ops, self.exact, self.constants) == self.ops and not tape.faults
        return same and _deciding(tape) <= self.exact


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
        self._kept = True

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
        key = (images[:_SHOWN].shape, images.dtype, images.device)
        if key not in self._known:
            try:
                with randomness_kept([images.device]):
                    two, three, steady = _tapes(images, read)
            except Exception:
                # The model may be written for one number of images only; what else is wrong comes
                # up again when all of them are recorded.
                if len(images) == 1:
                    raise
                return {}
            self._known[key] = _agreed(two, three, steady)
            if len(self._known) > _MOST_SIZES:
                del self._known[next(iter(self._known))]
            self._kept = steady and configuration(self._model) == current
        found = self._known[key]
        state = {id(tensor) for tensor in tensors_of(self._model)}
        if not all(local.constants <= state for local in found.values()):
            # Weights that are computed anew in each forward are not those that were read.
            del self._known[key]
            self._kept = False
        return {
            name: local
            if local.per_image <= state
            else local.without_plan("it adds or multiplies what may differ from image to image")
            for name, local in found.items()
        }

    def manner(
        self, images: Tensor, read: Callable[[Tensor], Tape], to_join: bool = False
    ) -> Manner | None:
        """How the model takes images, if none of them matters to the others.

        None for a model that changes with each run, or whose weights do, and for one with hooks, which
        are its user's and may count on one run.

        Args:
            images: [N, C, *map].
            read: Records a forward pass of a few images.
            to_join: Whether what the runs record is joined again.
        """
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules_of(self._model))
        if hooked or not self._kept:
            return None
        ways = self.of(images, read)
        plans = [way.plan for way in ways.values() if way.plan is not None]
        if not plans or len(plans) < len(ways) or not self._kept:
            return None
        every = max(way.largest for way in ways.values()) * images.element_size() * len(images)
        together = _TOGETHER_BYTES_ELSEWHERE
        if images.device.type == "cpu":
            least = _JOINED_BYTES_AT_LEAST if to_join else _TOGETHER_BYTES_AT_LEAST
            share = max(-(-every // _SHARE_OF_ALL), least)
            together = min(share, _TOGETHER_BYTES_ON_CPU)
        # At least two images a run: a forward may do something else for a single one.
        runs = max(1, min(len(images) // 2, -(-every // together)))
        exact = max(way.exact for way in ways.values())
        constants = frozenset(key for way in ways.values() for key in way.constants)
        return Manner(_asked(plans[0].recorded, exact, constants), runs, exact, constants)


def _asked(ops: Sequence[Op], exact: int, constants: frozenset[int]) -> list[Any]:
    """The ops by name; those behind the first ``exact`` with all that a model can choose.

    These may find their maps otherwise in memory than in the model's own run, and a model that looks at
    that may take other maps, other weights or another number for it.
    """
    numbers = {id(op): number for number, op in enumerate(ops)}

    def told(leaf: Any) -> Any:
        if isinstance(leaf, Value):
            return numbers.get(id(leaf.op))
        if isinstance(leaf, Tensor):
            return id(leaf) if id(leaf) in constants else leaf.shape
        return leaf

    return [
        op.name
        if number < exact
        else (op.name, op.module, [told(leaf) for leaf in leaves(op.arguments.values())])
        for number, op in enumerate(ops)
    ]


def _deciding(tape: Tape) -> int:
    """How many ops, from the first, there are up to the last that needs the model's own values.

    One of which a rule keeps something: a switch or a gate may be another one for a value that is
    rounded otherwise. And one that may need its maps as PyTorch lays them: a view, or a function that
    is not PyTorch's.
    """
    deciding = [count for count, op in enumerate(tape.ops, start=1) if not _takes_any(op)]
    return max(deciding, default=0)


def _takes_any(op: Op) -> bool:
    if op.name == "input":
        return True
    if not isinstance(op.func, torch._ops.OpOverload) or op.func.namespace != "aten":
        return False
    kind = op.rule and (op.rule.kind(op) if callable(op.rule.kind) else op.rule.kind)
    return kind not in (None, "view") and op.kept is None and op.fault is None


def _tapes(images: Tensor, read: Callable[[Tensor], Tape]) -> tuple[Tape, Tape | None, bool]:
    """Recordings of two images and, of more, of three; whether no random number was drawn."""
    before = _random_states(images.device)
    two = read(images[:2])
    steady = all(map(torch.equal, before, _random_states(images.device)))
    if len(images) < _SHOWN:
        return two, None, steady
    with _without_library() if _is_small(two) else nullcontext():
        return two, read(images[:_SHOWN]), steady


def _is_small(tape: Tape) -> bool:
    """Whether PyTorch's own convolutions, on a CPU, take next to no time and memory for what was recorded."""
    convolutions = [
        (op, value) for op in tape.ops if op.name == "convolution" for value in op.outputs
    ]
    if tape.device is None or tape.device.type != "cpu" or not convolutions:
        return False
    return all(
        value is not None
        and value.dtype == torch.float32
        and op["groups"] == 1
        and _SHOWN * op["weight"][0].nbytes * value.map_size.numel() <= _COLUMNS
        for op, value in convolutions
    )


@contextmanager
def _without_library() -> Iterator[None]:
    """Convolutions by PyTorch's own code: what its library makes for each size stays in memory."""
    mkldnn: Any = torch.backends.mkldnn
    with _SWITCHING:
        enabled = mkldnn.enabled
        mkldnn.enabled = False
        try:
            yield
        finally:
            mkldnn.enabled = enabled


def _agreed(two: Tape, three: Tape | None, steady: bool) -> dict[str, Local]:
    """The ways as two images show them; without a plan where three show another, or numbers are drawn."""
    found = {name: local_way(two, target) for name, target in two.layers.items()}
    if not steady:
        return {name: way.without_plan("it draws random numbers") for name, way in found.items()}
    if three is None:
        return found
    other = {name: local_way(three, target) for name, target in three.layers.items()}
    return {
        name: local
        if _same_calls(local, other[name])
        else local.without_plan("it depends on the number of images")
        for name, local in found.items()
    }


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _same_calls(one: Local, other: Local) -> bool:
    """Whether two plans are of the same ops, given the same besides values of the forward pass."""
    plans = [local.plan for local in (one, other) if local.plan is not None]
    if len(plans) < 2:
        return not plans
    return len(plans[0].ops) == len(plans[1].ops) and all(
        a.name == b.name and _same_arguments(a, b)
        for a, b in zip(plans[0].ops, plans[1].ops, strict=True)
    )


def _same_arguments(one: Op, other: Op) -> bool:
    pairs = [leaves(op.arguments.values()) for op in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and all(map(_same, *pairs))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Value) or isinstance(other, Value):
        return isinstance(one, Value) and isinstance(other, Value)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.device == other.device
        return one is other or (alike and torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)

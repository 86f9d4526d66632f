"""What one forward pass did: which ops ran on what came from the input, and what their rules keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_deconv.engine.registry import Rule


@dataclass(frozen=True)
class Options:
    """What the user may choose about the reverse pass, as the rules need to know while recording.

    Attributes:
        gates: "constant" keeps gates as constants; "gradient" is the product rule.
        overlap: "add" is the adjoint of overlapping pools; "place" overwrites like ``max_unpool2d``.
    """

    gates: str = "constant"
    overlap: str = "add"


@dataclass(eq=False)
class Value:
    """A tensor of the forward pass that depends on the input; the tensor itself is not held.

    Attributes:
        made_by: The op that made it. An op holds its values, so they do not hold it: what a tape
            keeps is freed with the tape, and waits for no garbage collection.
        shape: Its shape, samples first.
        dtype: Its dtype.
        storage: Key of the memory it lived in.
        generation: How often that memory had been overwritten when the value was made.
        constant: Whether no signal can flow through it: it was compared, cast to whole numbers or
            detached.
    """

    made_by: weakref.ref[Op]
    shape: torch.Size
    dtype: torch.dtype
    storage: int = 0
    generation: int = 0
    constant: bool = False

    @property
    def op(self) -> Op:
        """The op that made it, as long as its tape is there; the tape's input for the first one."""
        op = self.made_by()
        assert op is not None
        return op

    @property
    def map_size(self) -> torch.Size:
        """The sizes behind samples and channels, [*spatial]."""
        return self.shape[2:]


@dataclass(eq=False)
class Op:
    """One recorded call. Arguments by name; a ``Value`` stands where a tensor came from the input.

    Attributes:
        name: The aten name without overload or in-place underscore, such as ``convolution``.
        arguments: Every argument of the op's schema by name, defaults filled in.
        outputs: The values it returned (None where an output is no tensor).
        module: Dotted name of the innermost module that was running ("" for the model itself).
        module_type: That module's class name.
        rule: Its reverse rule, None where there is none.
        kept: What the rule asked to keep.
        fault: Why the tape lost track here, None where it did not.
        func: Runs the op again (out of place) on arguments by name; None where it cannot be.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    outputs: list[Value | None] = field(default_factory=list)
    module: str = ""
    module_type: str = ""
    rule: Rule | None = None
    kept: Any = None
    fault: str | None = None
    func: Callable[..., Any] | None = None

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    @cached_property
    def parents(self) -> list[Value]:
        """The values it read, in argument order, repeats included."""
        return [leaf for leaf in leaves(self.arguments.values()) if type(leaf) is Value]

    @property
    def where(self) -> str:
        """The op and its module, for messages."""
        module = f"{self.module} ({self.module_type})" if self.module else "the model's own forward"
        return f"{self.name} in {module}"


@dataclass
class Tape:
    """What one forward pass did.

    Attributes:
        ops: In the order in which they ran.
        inputs: One value per tracked input.
        layers: For each chosen layer the value of its output.
        activations: For each chosen layer its output, as the layer returned it.
        calls: How often each chosen layer was seen to run.
        complete: Whether the forward ran to its end, so that ``calls`` is the whole truth.
        samples: Number of images N.
        device: Where it ran.
        faults: What made the whole recording unreliable, such as control flow that read values.
        call: Which call of a layer was asked for, None where there is but one.
        relus: Names of the ``nn.ReLU`` modules: what Captum hooks.
        gradients_off: Modules in which the model turned gradients off.
    """

    ops: list[Op] = field(default_factory=list)
    inputs: list[Value] = field(default_factory=list)
    layers: dict[str, Value] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    complete: bool = False
    samples: int = 0
    device: torch.device | None = None
    faults: list[str] = field(default_factory=list)
    call: int | None = None
    relus: frozenset[str] = frozenset()
    gradients_off: list[str] = field(default_factory=list)

    def kind(self) -> tuple[Any, ...]:
        """What decides whether rules can take it: all but the values of tensors.

        Equal for two tapes of which our own rules take both or neither. A rule of the user's may look at
        anything, so a tape that has one is equal to no other.
        """
        numbers: dict[Any, int] = {}
        found: list[Any] = [self.samples, *self.faults]
        for op in self.ops:
            found += (op.name, op.rule, op.fault, op.func)
            if op.rule is not None and not op.rule.is_ours:
                found.append(object())
            _describe(op.arguments.values(), numbers, found)
            kept = op.kept if isinstance(op.kept, dict) else {"": op.kept}
            found += (
                (name, each if isinstance(each, str) else type(each)) for name, each in kept.items()
            )
            for value in op.outputs:
                numbers[value] = len(numbers)
                found.append(value and (value.shape, value.dtype, value.constant))
        found += (numbers.get(value) for value in self.layers.values())
        return tuple(found)


_NUMBERS = frozenset({int, float, bool, type(None)})


def _describe(arguments: Iterable[Any], numbers: Mapping[Any, int], found: list[Any]) -> None:
    """Adds what a call was given: values by number, other tensors by shape."""
    for argument in arguments:
        kind = type(argument)
        found.append(kind)
        if kind in _NUMBERS:
            found.append(argument)
        elif kind is Value:
            found.append(numbers.get(argument))
        elif isinstance(argument, Tensor):
            found += (argument.shape, argument.dtype)
        elif isinstance(argument, (list, tuple, dict)):
            found.append(len(argument))
            _describe(_items(argument), numbers, found)
        else:
            found.append(argument)


# An op's arguments hold nothing but tensors, numbers, and lists and dicts of these. Torch's own pytrees
# know more, and took a sixth of the time of recording a network with small maps.


def leaves(arguments: Iterable[Any]) -> list[Any]:
    """What an op's arguments hold, lists and dicts opened."""
    found: list[Any] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple, dict)):
            found += leaves(_items(argument))
        else:
            found.append(argument)
    return found


def tensors_in(arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among them."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple, dict)):
            found += tensors_in(_items(argument))
    return found


def _items(argument: Any) -> Iterable[Any]:
    return argument.values() if isinstance(argument, dict) else argument


def with_tensors(function: Callable[[Tensor], Any], arguments: Any) -> Any:
    """The same arguments with each tensor replaced."""
    if isinstance(arguments, Tensor):
        return function(arguments)
    if isinstance(arguments, dict):
        return {key: with_tensors(function, value) for key, value in arguments.items()}
    if isinstance(arguments, (list, tuple)):
        made = [with_tensors(function, argument) for argument in arguments]
        return made if isinstance(arguments, list) else tuple(made)
    return arguments

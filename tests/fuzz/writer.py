"""Writes one network twice while keeping track of which of the user's tensors share memory.

The user's form may overwrite tensors; the reference never does. So every variable of the user's
form is a channel range of a storage, and a storage knows the reference's name of what it holds
now: after ``y[:, :2].relu_()`` everything that aliases ``y`` reads the reference's new name.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass
class Storage:
    """What one allocation of the user's form holds now.

    Args:
        value: the reference's name of it.
        shape: channels and extents of the map.
        saved: autograd keeps it for its backward, so that overwriting it forbids training.
        frozen: never overwritten: the inputs, and what is seen through views of other kinds.
        gate: made by sigmoid, hardsigmoid or softmax.
        reads: how many ops have read it.
        version: how many ops have overwritten it.
        spent: not to be read again (the input of a ReLU in networks where Captum must be right).
        rectified: made by a rectifier (Captum is wrong where one ReLU reads another's output).
    """

    value: str
    shape: Shape
    saved: bool = False
    frozen: bool = False
    gate: bool = False
    reads: int = 0
    version: int = 0
    spent: bool = False
    rectified: bool = False


@dataclass(frozen=True)
class Variable:
    """A tensor of the user's form: channels first to last of a storage."""

    name: str
    storage: Storage
    first: int
    last: int

    @property
    def channels(self) -> int:
        return self.last - self.first

    @property
    def height(self) -> int:
        return self.storage.shape[1]

    @property
    def width(self) -> int:
        return self.storage.shape[2]

    @property
    def shape(self) -> Shape:
        return (self.channels, *self.storage.shape[1:])

    @property
    def whole(self) -> bool:
        return self.channels == self.storage.shape[0]


@dataclass(frozen=True)
class Tap:
    """The output of a named module at the moment it was made."""

    storage: Storage
    version: int
    shape: Shape

    @property
    def overwritten(self) -> bool:
        """Whether a later op overwrites what the module returned."""
        return self.storage.version != self.version


@dataclass
class Writer:
    """Both forms of a network in the making.

    Args:
        rng: makes every choice.
        plain: only what Captum's deconvolution gets right: each rectifier an ``nn.ReLU`` of its
            own whose input nothing else reads; no gates, no contrast normalisation.
        trainable: leave alone what autograd has saved.
    """

    rng: random.Random
    plain: bool = False
    trainable: bool = True
    init: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    reference: list[str] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    taps: dict[str, Tap] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    constructs: set[str] = field(default_factory=set)
    counter: int = 0

    def name(self, prefix: str) -> str:
        """A name that is new in this network."""
        self.counter += 1
        return f"{prefix}{self.counter}"

    def module(self, constructor: str, prefix: str) -> str:
        """Declares a submodule and returns its name."""
        name = self.name(prefix)
        self.init.append(f"self.{name} = {constructor}")
        return name

    def parameter(self, *shape: int) -> str:
        """Declares a parameter and returns its name."""
        name = self.name("weight")
        self.init.append(f"self.{name} = nn.Parameter(torch.empty{shape})")
        return name

    def pick(self, accept: Callable[[Variable], bool] = lambda _: True) -> Variable | None:
        """A variable that is still to be read, more likely a recent one; None where none is."""
        choice = [v for v in self.variables if not v.storage.spent and accept(v)]
        if not choice:
            return None
        if self.rng.random() < 0.7:
            return choice[-1]
        return self.rng.choice(choice)

    def read(self, x: Variable, saved: bool = True) -> tuple[str, str]:
        """The user's and the reference's source for ``x``, as input of an op.

        Args:
            x: what is read.
            saved: whether autograd keeps the op's input.
        """
        x.storage.reads += 1
        x.storage.saved |= saved
        return x.name, self.value(x)

    def value(self, x: Variable) -> str:
        """The reference's source for what ``x`` holds now."""
        return x.storage.value if x.whole else f"{x.storage.value}[:, {x.first}:{x.last}]"

    def evaluate(self, expression: str) -> str:
        """Gives an expression of the reference a name."""
        name = self.name("v")
        self.reference.append(f"{name} = {expression}")
        return name

    def write(
        self,
        user: str,
        reference: str,
        shape: Shape,
        *,
        saved: bool = False,
        gate: bool = False,
        frozen: bool = False,
    ) -> Variable:
        """A new tensor in both forms."""
        name = self.name("h")
        self.forward.append(f"{name} = {user}")
        storage = Storage(self.evaluate(reference), shape, saved=saved, gate=gate, frozen=frozen)
        return self.add(Variable(name, storage, 0, shape[0]))

    def alias(self, user: str, x: Variable, first: int = 0, last: int | None = None) -> Variable:
        """A new name of the user's for channels ``first`` to ``last`` of ``x``."""
        name = self.name("h")
        self.forward.append(f"{name} = {user}")
        last = x.channels if last is None else last
        return self.add(Variable(name, x.storage, x.first + first, x.first + last))

    def add(self, x: Variable) -> Variable:
        self.variables.append(x)
        return x

    def call(self, module: str, x: str) -> str:
        """The user's source for a call of a submodule."""
        self.calls[module] = self.calls.get(module, 0) + 1
        return f"self.{module}({x})"

    def tap(self, module: str, x: Variable) -> Variable:
        """Notes that ``x`` is what ``module`` has just returned."""
        self.taps[module] = Tap(x.storage, x.storage.version, x.shape)
        self.reference.append(f'taps["{module}"] = {self.value(x)}')
        if (call := self.calls.get(module, 0)) > 0:
            self.reference.append(f'taps["{module}@{call - 1}"] = {self.value(x)}')
        return x

    def may_overwrite(self, x: Variable) -> bool:
        """Whether an op may work in place on ``x``."""
        return not x.storage.frozen and not (x.storage.saved and self.trainable)

    def overwrite(self, x: Variable, reference: str, saved: bool) -> None:
        """Notes that the user's form has overwritten ``x`` with the reference's expression."""
        storage = x.storage
        new = self.evaluate(reference)
        if not x.whole:
            old, parts = storage.value, [new]
            if x.first > 0:
                parts.insert(0, f"{old}[:, :{x.first}]")
            if x.last < storage.shape[0]:
                parts.append(f"{old}[:, {x.last}:]")
            new = self.evaluate(f"torch.cat([{', '.join(parts)}], 1)")
        storage.value = new
        storage.saved |= saved
        storage.gate = False
        storage.version += 1

    def layers(self) -> list[str]:
        """Names of the modules that were called once, in the order of their calls."""
        return [name for name in self.taps if self.calls.get(name.split(".")[0], 0) == 1]

    def repeated(self) -> list[tuple[str, int]]:
        """Names of the modules that were called more than once, and how often."""
        return [(name, self.calls[name]) for name in self.taps if self.calls.get(name, 0) > 1]

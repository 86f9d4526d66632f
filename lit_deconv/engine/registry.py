"""The registry of reverse rules: one entry an op, extended by users with the decorator we use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from lit_deconv.engine.signal import Signal
    from lit_deconv.engine.tape import Op, Options

Reverse = Callable[["Op", "Signal"], Iterable[tuple[Any, "Signal"]]]
Keep = Callable[["Op", Mapping[str, Any], Any, "Options"], Any]
Run = Callable[[Callable[..., Any], Mapping[str, Any]], Any]
AnyReverse = TypeVar("AnyReverse", bound=Reverse)

RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Rule:
    """How one op is reversed.

    Attributes:
        reverse: Takes the recorded op and the signal at its output; yields pairs of an argument
            and the signal that flows to it. Pairs whose argument is a constant are dropped.
        of: Names of the arguments that a signal may flow to or that are kept as constants; any other
            argument that depends on the input makes the op unsupported.
        before: Called before the op runs, returns what to keep (for what the op overwrites).
        after: Called after the op ran, returns what to keep.
        run: Runs the op, given it and its arguments by name: a faster way to the same result, to the
            bit. None where PyTorch's own is as good.
        run_laid: The same where its result may lie otherwise in memory: of the last op that must be exact,
            and behind it.
        run_rounded: The same where it may be rounded otherwise, too: behind that op.
        windows: Whether ``reverse`` takes a windowed signal; if not, it gets the full map.
        one_hot: Whether it takes a signal that is zero but in one channel of each seed; if not, it
            gets all channels.
        kind: What it does, for ``explain()``: adjoint, rectifier, local gradient, gate, pass-through.
    """

    reverse: Reverse
    of: tuple[str, ...]
    before: Keep | None = None
    after: Keep | None = None
    run: Run | None = None
    run_laid: Run | None = None
    run_rounded: Run | None = None
    windows: bool | Callable[[Op], bool] = False
    one_hot: bool | Callable[[Op], bool] = False
    kind: str | Callable[[Op], str] = "adjoint"

    @property
    def is_ours(self) -> bool:
        """Whether it is one of this package: these refuse a call by its kind, whatever its values."""
        return self.reverse.__module__.startswith("lit_deconv.engine.rules.")


def reverse_rule(
    *names: str,
    of: str | tuple[str, ...] = "self",
    before: Keep | None = None,
    after: Keep | None = None,
    run: Run | None = None,
    run_laid: Run | None = None,
    run_rounded: Run | None = None,
    windows: bool | Callable[[Op], bool] = False,
    one_hot: bool | Callable[[Op], bool] = False,
    kind: str | Callable[[Op], str] = "adjoint",
) -> Callable[[AnyReverse], AnyReverse]:
    """Registers a reverse rule for aten ops, or ops of other libraries.

    Args:
        *names: Op names without overload: ``"relu"`` for ``aten::relu.default`` and its in-place form,
            ``"namespace::name"`` for an op outside aten.
        of: Argument or arguments that the signal flows to.
        before: See ``Rule``; called with the op, its arguments by name, None and the options.
        after: The same with the op's result.
        run: See ``Rule``.
        run_laid: See ``Rule``.
        run_rounded: See ``Rule``.
        windows: The rule takes windowed signals too (or a function of the op that says so).
        one_hot: The rule takes signals of one channel a seed too.
        kind: Shown by ``explain()``.

    Returns:
        A decorator for a function of the recorded op and the signal at its output, which yields
        pairs of an argument and the signal that flows to it.

    Example:
        >>> @reverse_rule("mylib::scale_by_two", of="x")
        ... def scale_by_two(op, signal):
        ...     yield op["x"], signal.map(lambda values: values * 2)
    """

    def register(reverse: AnyReverse) -> AnyReverse:
        of_names = (of,) if isinstance(of, str) else of
        for name in names:
            RULES[name] = Rule(
                reverse, of_names, before, after, run, run_laid, run_rounded, windows, one_hot, kind
            )
        return reverse

    return register


def rule_for(name: str) -> Rule | None:
    """The rule of an op, None where there is none."""
    return RULES.get(name)


def packet_of(func: torch._ops.OpOverload) -> str:
    """An op's name without overload and in-place underscore; outside aten with its namespace."""
    namespace, _, name = func._schema.name.partition("::")
    if func._schema.is_mutable and name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if namespace == "aten" else f"{namespace}::{name}"

"""What an overload's schema says of a call: its name, its arguments, and what it writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_deconv.engine.registry import packet_of
from lit_deconv.engine.tape import tensors_in

# Overloads that stand for another op: interpolation by factor, max(x, y) for maximum(x, y).
_SHORTHANDS = {"vec", "other"}
# Types of arguments that hold no tensor, alone, optional or in lists.
_PLAIN = re.compile(
    r"(Optional\[|List\[)*(int|float|bool|complex|number|str|Device|Generator|SymInt)\]*"
)
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Overload(NamedTuple):
    """What is read off an overload once, for its schema takes long to read.

    Attributes:
        name: See ``Op``.
        shorthand: Whether it stands for another op, so that a rule of its name is not its own.
        defaults: By argument name, in order.
        holding: Names of the arguments that may be tensors or hold some.
        written: Those of them that a call writes into.
        composite: Whether PyTorch has a kernel that makes it of other ops.
        out_of_place: The same overload that writes into nothing, None where there is none.
    """

    name: str
    shorthand: bool
    defaults: dict[str, Any]
    holding: tuple[str, ...]
    written: tuple[str, ...]
    composite: bool
    out_of_place: Callable[..., Any] | None

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments by name, with the schema's defaults."""
        return {**self.defaults, **dict(zip(self.defaults, args, strict=False)), **kwargs}

    def tensors(self, bound: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call."""
        return tensors_in([bound[name] for name in self.holding])

    def written_in(self, bound: Mapping[str, Any]) -> list[Tensor]:
        """Those that it writes into."""
        return tensors_in([bound[name] for name in self.written])


@cache
def overload_of(func: torch._ops.OpOverload) -> Overload:
    """Reads an overload's schema."""
    arguments = func._schema.arguments
    lists_places = func is torch.ops.aten.where.default  # where(x) is nonzero(x)
    return Overload(
        packet_of(func),
        func._overloadname in _SHORTHANDS or lists_places,
        {argument.name: argument.default_value for argument in arguments},
        tuple(argument.name for argument in arguments if not _PLAIN.fullmatch(str(argument.type))),
        tuple(
            argument.name
            for argument in arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ),
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE),
        _out_of_place(func),
    )


def decomposed(
    func: Any, overload: Overload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Runs a composite op as the ops that it is made of, NotImplemented where it is none.

    PyTorch's own kernel goes first: importing some parts of torch registers Python forms besides,
    and what is recorded must not depend on what else has been imported.
    """
    if overload.composite:
        return func._op_dk(_COMPOSITE, *args, **kwargs)
    return func.decompose(*args, **kwargs)


def _out_of_place(func: Any) -> Callable[..., Any] | None:
    """The same overload that writes into nothing."""
    if not func._schema.is_mutable:
        return func
    namespace, _, name = func._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    found = getattr(packet, func._overloadname, None)
    # dropout calls its argument input, dropout_ calls it self.
    names = [argument.name for argument in func._schema.arguments]
    same = found is not None and [argument.name for argument in found._schema.arguments] == names
    return found if same else None

"""One call of the torch API, as a function mode sees it, whatever form it was written in."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# Modules whose Python functions are run from their source, so that the calls inside them are seen.
_OPENED = frozenset({"torch.nn.functional", "torch.functional"})
_UNSEEN = dict.fromkeys(
    ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"),
    lambda *args: False,
)

Place: TypeAlias = "int | str"
"""Where an argument stands in a call: its position, or its name where it was named."""


@dataclass(eq=False)
class Call:
    """A torch function with its arguments.

    Attributes:
        func: What was called.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def name(self) -> str:
        """The function's name: one for module, functional, method and in-place forms alike."""
        name = getattr(self.func, "__name__", "").split(".")[0]
        if name.startswith("__"):
            return {"__truediv__": "div", "__pow__": "pow"}.get(name, name.strip("_"))
        return name.strip("_")

    @cached_property
    def in_place(self) -> bool:
        """Whether the call overwrites its first argument."""
        name = getattr(self.func, "__name__", "").split(".")[0]
        if name.endswith("_") and not name.endswith("__"):
            return True
        if name == "__setitem__":
            return True
        if "inplace" in self.kwargs:
            return bool(self.kwargs["inplace"])
        if self.opens and len(self.args) > 1:
            names = inspect.signature(self.func).parameters
            return "inplace" in names and bool(self.bound.get("inplace", False))
        return False

    @cached_property
    def bound(self) -> dict[str, Any]:
        """A Python function's arguments by name, defaults filled in."""
        bound = inspect.signature(self.func).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return bound.arguments

    @property
    def first(self) -> Any:
        """What the call is about: its first argument."""
        return self.argument(0, "input", self.kwargs.get("self", self.kwargs.get("query")))

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """One argument, wherever it was written."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, also in lists."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def run(self, instead: Mapping[int, Tensor] | None = None) -> Any:
        """Makes the call.

        Args:
            instead: What to put in place of arguments, by the ``id`` of the tensor that goes.
        """
        args, kwargs = self.args, self.kwargs
        if instead:
            args, kwargs = tree_map(lambda leaf: instead.get(id(leaf), leaf), (args, kwargs))
        return self.func(*args, **kwargs)

    @property
    def written(self) -> list[Tensor]:
        """The tensors that the call overwrites."""
        written = [self.first if self.in_place else self.kwargs.get("out")]
        if self.opens and self.name in ("batch_norm", "instance_norm"):
            written = [self.bound["running_mean"], self.bound["running_var"]]
        return [tensor for tensor in written if isinstance(tensor, Tensor)]

    def placed(self, *places: tuple[int, str]) -> dict[Place, Tensor]:
        """Arguments by where they were written, of those that may stand in these places."""
        found = {i if i < len(self.args) else name: self.argument(i, name) for i, name in places}
        return {place: value for place, value in found.items() if isinstance(value, Tensor)}

    def at(self, values: Mapping[Place, Any]) -> Call:
        """The same call with other arguments in some places."""
        return self.replaced(
            args=tuple(values.get(i, argument) for i, argument in enumerate(self.args)),
            kwargs={name: values.get(name, value) for name, value in self.kwargs.items()},
        )

    @property
    def flat(self) -> Call:
        """The same call with a list of operands (of einsum) written out."""
        if len(self.args) == 2 and isinstance(self.args[1], (list, tuple)):
            return self.replaced(args=(self.args[0], *self.args[1]))
        return self

    def replaced(self, **changes: Any) -> Call:
        """The same call with other arguments."""
        return Call(self.func, changes.get("args", self.args), changes.get("kwargs", self.kwargs))

    def without_inference_tensors(self) -> Call:
        """The same call on ordinary copies of inference tensors, which autograd cannot save."""
        if not any(tensor.is_inference() for tensor in self.tensors):
            return self

        target = self.first if self.in_place else None  # PyTorch itself refuses to write to one

        def ordinary(leaf: Any) -> Any:
            copied = isinstance(leaf, Tensor) and leaf.is_inference() and leaf is not target
            return leaf.clone() if copied else leaf

        return self.replaced(
            args=tree_map(ordinary, self.args), kwargs=tree_map(ordinary, self.kwargs)
        )

    @property
    def opens(self) -> bool:
        """Whether the function is written in Python, out of torch functions."""
        # By its globals: max_pool2d and others are dispatchers that only claim the module's name.
        return isinstance(self.func, FunctionType) and self.func.__globals__["__name__"] in _OPENED

    def run_opened(self) -> Any:
        """Runs a Python function so that a function mode sees the calls inside it.

        Such a function first hands itself to the active mode; a copy that sees none does not.
        """
        func = self.func
        copy = FunctionType(
            func.__code__, {**func.__globals__, **_UNSEEN}, func.__name__, func.__defaults__,
            func.__closure__,
        )  # fmt: skip
        copy.__kwdefaults__ = func.__kwdefaults__
        return copy(*self.args, **self.kwargs)


def same_map(one: Tensor, other: Any) -> bool:
    """Whether two tensors are one, or lie in the same memory in the same way, as equal slices do."""
    if one is other:
        return True
    return (
        isinstance(other, Tensor)
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.data_ptr() == other.data_ptr()
    )


def is_zero(value: Any) -> bool:
    """Whether a bound is 0: a number, or a tensor of nothing but zeros."""
    if isinstance(value, Tensor):
        return value.numel() > 0 and not value.is_complex() and bool((value == 0).all())
    return isinstance(value, (int, float)) and value == 0

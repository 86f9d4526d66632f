"""Catches, with passive hooks, what the module that runs was given and what its layers answered.

Nothing here runs the model, but `first_call`, which runs a step of a compiled model up to its first
call and no further.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_deconv.layers import Observation, kind_of

from .isolation import depth
from .order import Given
from .probe import Probe, find_images
from .strongest import Collection

__all__ = ["Call", "Capture", "NoImageError", "first_call"]


class NoImageError(ValueError):
    """No call with a batch of images was seen; the message says what was."""


@dataclass
class Call:
    """One call of one module.

    Args:
        name: The module's dotted name, "" for the outermost.
        module: The module.
        start: Tick at which it began.
        shown: Shapes of the arguments, for messages.
        probe: The images that were kept, where it is an outermost call with images.
        rows: Which images of the call these are.
        every: All images of such a call, where they were asked for.
        by_hash: Whether these are known by a hash of theirs alone.
        precision: Device type and dtype of the autocast around it; None: there was none.
        end: Tick at which it returned, 0 while it has not.
        shape: Shape of its output; empty where that is no tensor.
    """

    name: str
    module: nn.Module
    start: int
    shown: str
    probe: Probe | None = None
    rows: tuple[int, ...] = ()
    every: Probe | None = None
    by_hash: bool = True
    precision: tuple[str, torch.dtype] | None = None
    end: int = 0
    shape: tuple[int, ...] = ()

    def holds(self, other: Call) -> bool:
        """Whether the other call happened inside this one."""
        return self.start <= other.start and other.end <= self.end


@dataclass
class Capture:
    """Passive hooks on modules while a batch runs; they draw nothing and wait for no device.

    Args:
        modules: By name. Those that may be the one that runs, and the layers.
        entry: Name of the module whose input is wanted; None: any outermost call with images.
        input_key: Position, keyword or key of the images among its arguments; None: the first
            batch of images in them.
        collection: Ranks the units of the layers; None: there is none yet.
    """

    modules: Mapping[str, nn.Module]
    entry: str | None = None
    input_key: int | str | None = None
    collection: Collection | None = None
    calls: list[Call] = field(default_factory=list)
    failure: Exception | None = None
    """What went wrong in a hook: never raised inside the user's forward."""
    rows: Callable[[int], list[int]] | None = None
    """Which images to keep of a call with so many; None keeps none."""
    every: bool = False
    """Whether to keep all images of such calls beside."""
    given: Given = field(default_factory=Given)
    """What the loader gave."""
    _open: list[Call] = field(default_factory=list)
    _tick: int = 0
    _depth: int = 0
    _placed: list[RemovableHandle] = field(default_factory=list)
    _first: dict[str, Tensor] = field(default_factory=dict)

    def attach(self, rows: Callable[[int], list[int]] | None = None, every: bool = False) -> None:
        """Put the hooks on, for one batch.

        Args:
            rows: Which images of each call to keep, from their number; None keeps none.
            every: Keep all images of each such call beside.
        """
        self.detach()
        self.calls, self._open, self._tick = [], [], 0
        self.rows, self.every, self._depth = rows, every, depth()
        for name, module in self.modules.items():
            self._placed += [
                module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                module.register_forward_hook(self._leaving(name)),
            ]

    def detach(self) -> None:
        """Take the hooks off; what was caught stays."""
        for placed in self._placed:
            placed.remove()
        self._placed, self._first = [], {}
        self.given = replace(self.given, batch=None)

    def entry_call(self, layers: Mapping[str, nn.Module]) -> Call:
        """The call that runs the chosen layers on images.

        Args:
            layers: The chosen layers; may be empty.

        Returns:
            The first outermost call with images that holds a call of each layer, else of most;
            without layers, the first that runs a convolution.

        Raises:
            NoImageError: When no call was given images, or none of the layers ran in one.
        """
        candidates = [call for call in self.calls if call.probe is not None and call.end]
        if not candidates:
            raise NoImageError(self._no_image())
        if not layers:
            with_filters = [call for call in candidates if self._runs_filters(call)]
            return (with_filters or candidates)[0]
        held = [len(self.inside(call).keys() & layers.keys()) for call in candidates]
        if not any(held):
            raise NoImageError(
                f"none of the layers {', '.join(layers)} ran inside a call with images; calls with "
                f"images: {', '.join(_title(call) for call in candidates)}. Name the module that "
                "runs them with module="
            )
        return candidates[held.index(max(held))]

    def after(self, entry: Call) -> list[Call]:
        """Later calls of other modules with weights that were given what looks like its output."""
        return [
            call
            for call in self.calls
            if call.start > entry.end
            and call.module is not entry.module
            and str(list(entry.shape)) in call.shown
            and any(True for _ in call.module.parameters())
        ]

    def _runs_filters(self, entry: Call) -> bool:
        called = (calls[-1].module for calls in self.inside(entry).values())
        return any(kind_of(module) == "conv" for module in (*called, entry.module))

    def inside(self, entry: Call) -> dict[str, list[Call]]:
        """The calls inside one, by name, in the order in which they returned."""
        found: dict[str, list[Call]] = {}
        for call in sorted(self.calls, key=lambda call: call.end):
            if call.end and call is not entry and entry.holds(call):
                found.setdefault(call.name, []).append(call)
        return found

    def observations(self, entry: Call) -> list[Observation]:
        """What `layers.automatic` chooses from."""
        return [
            Observation(name, kind_of(calls[-1].module), calls[-1].shape, len(calls))
            for name, calls in self.inside(entry).items()
        ]

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                if self._depth == depth() and not _is_redirected(module):
                    self._enter(name, module, args, kwargs)
            except Exception as error:  # the user's forward goes on
                self.failure = self.failure or error

        return hook

    def _leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            try:
                if self._depth == depth():
                    self._leave(name, module, output)
            except Exception as error:
                self.failure = self.failure or error

        return hook

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._tick += 1
        call = Call(name, module, self._tick, "")
        wanted = name == self.entry if self.entry is not None else True
        if self.rows is not None and not any(call.probe for call in self._open):
            call.shown = _shown(args, kwargs)
            found = find_images(args, kwargs, self.input_key) if wanted else None
            if found is not None:
                call.rows = tuple(self.rows(len(found)))
                call.probe = found.take(list(call.rows))
                call.every = found.take(list(range(len(found)))) if self.every else None
                call.by_hash = self._by_hash(name, found.images)
                call.precision = _autocast(found.images.device.type)
        if self.collection is not None and name == self.entry:
            found = find_images(args, kwargs, self.input_key)
            if found is not None:
                by_hash = self._by_hash(name, found.images)
                self.collection.enter(found.images, self.given.indices, by_hash)
        self._open.append(call)
        self.calls.append(call)

    def _by_hash(self, name: str, images: Tensor) -> bool:
        # of several views in one batch the first that a module is given has the indices
        first = self._first.setdefault(name, images)
        return first is not images or not self.given.numbers(images)

    def _leave(self, name: str, module: nn.Module, output: Any) -> None:
        while self._open:
            call = self._open.pop()  # calls above it that raised were never left
            if call.module is module and call.name == name:
                break
        else:
            return
        self._tick += 1
        call.end = self._tick
        if isinstance(output, Tensor):
            call.shape = tuple(output.shape)
        if self.collection is not None:
            self.collection.see(name, output)
            if name == self.entry:
                self.collection.leave()

    def _no_image(self) -> str:
        given = Counter(f"{_title(call)}({call.shown})" for call in self.calls if call.shown)
        who = f"module {self.entry!r} was given no" if self.entry else "no module was given a"
        key = "" if self.input_key is None else f" under input_key={self.input_key!r}"
        seen = f"seen: {'; '.join(list(given)[:3])}" if given else "it was not called at all"
        return (
            f"{who} batch of images [N, C, H, W] of floating-point numbers{key}; "
            f"{seen}. Name the module that takes images with module=, its argument with input_key="
        )


class _CaughtError(BaseException):
    """Ends a step at the call that was wanted; no `except Exception` of the user's catches it."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def first_call(
    model: nn.Module,
    step: Callable[..., Any],
    arguments: Mapping[str, Any],
    capture: Capture,
    layers: Mapping[str, nn.Module],
    rows: Callable[[int], list[int]],
) -> Call:
    """Run a step of a compiled model up to its first call with images; for use inside `isolated`.

    Hooks in a compiled model do not fire, and a batch of validation is not to leave its compiled
    graph. So the step is run once more as Python code, and ended where the images are known.

    Args:
        model: The LightningModule; its `log` and `log_dict` are silent meanwhile.
        step: Its `validation_step`, or another.
        arguments: By name; those that the step does not take are left out.
        capture: The hooks to use.
        layers: A call of a module that holds them all is wanted.
        rows: Which images to keep.

    Raises:
        NoImageError: When the step has no such call.
    """
    wanted = set(layers.values())
    catching: list[RemovableHandle] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = capture.calls[-1] if capture.calls else None
        if call is not None and call.module is module and call.probe is not None:
            held = set(module.modules())
            if wanted <= held if wanted else any(kind_of(m) == "conv" for m in held):
                raise _CaughtError(call)

    silent = {name: _silent for name in ("log", "log_dict") if name not in vars(model)}
    capture.attach(rows)
    try:
        for name, nothing in silent.items():
            object.__setattr__(model, name, nothing)
        for module in capture.modules.values():
            catching.append(module.register_forward_pre_hook(catch, with_kwargs=True))
        step(**_accepted(step, arguments))
    except _CaughtError as caught:
        return caught.call
    finally:
        for placed in catching:
            placed.remove()
        for name in silent:
            object.__delattr__(model, name)
        capture.detach()
    given = [_title(call) for call in capture.calls if call.probe is not None]
    if given and layers:
        raise NoImageError(
            f"no one call with images runs all of {', '.join(layers)}; calls with images: "
            f"{', '.join(given)}. Choose layers of one of them"
        )
    raise NoImageError(capture._no_image())


def _silent(*args: Any, **kwargs: Any) -> None:
    """Takes the place of `self.log` where a step is run once more."""


def _accepted(step: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(step).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in parameters}


def _autocast(device: str) -> tuple[str, torch.dtype] | None:
    enabled = torch.is_autocast_enabled(device)
    return (device, torch.get_autocast_dtype(device)) if enabled else None


def _is_redirected(module: nn.Module) -> bool:
    # DDP calls the LightningModule with the batch in place of forward's arguments
    forward = vars(module).get("forward")
    return "_ForwardRedirection" in getattr(forward, "__qualname__", "")


def _shown(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = [("", value) for value in args] + [(f"{k}=", v) for k, v in kwargs.items()]
    return ", ".join(f"{name}{_described(value)}" for name, value in named)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_described(v)}" for k, v in list(value.items())[:4]) + "}"
    return type(value).__name__


def _title(call: Call) -> str:
    return call.name or type(call.module).__name__

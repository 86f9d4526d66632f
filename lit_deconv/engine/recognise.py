"""What only shows above the level of aten ops: contrast normalisation, custom Functions, grad mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from lit_deconv.engine.recorder import Recorder


# Methods that hand an activation's values to Python, or take them from it, without an aten op.
UNSEEN = {
    torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.__dlpack__, torch.Tensor.apply_,
    torch.Tensor.map_, torch.Tensor.map2_,
    torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__,
}  # fmt: skip
_READS = UNSEEN | {torch.Tensor.tolist}


@contextmanager
def seen_last(
    layers: Iterable[nn.Module], ran: Callable[[nn.Module, Any], None]
) -> Iterator[Callable[[nn.Module], bool]]:
    """Sees the outputs of layers that have hooks of the user's, which may replace them.

    Hooks on all modules run before a module's own, so such a layer gets one more for the time.

    Args:
        layers: The chosen layers.
        ran: Called with such a layer and what it finally returned.

    Yields:
        Whether a module is such a layer.
    """
    hooked = {id(layer): layer for layer in layers if layer._forward_hooks}
    handles = [
        layer.register_forward_hook(lambda module, args, output: ran(module, output))
        for layer in hooked.values()
    ]
    try:
        yield lambda module: id(module) in hooked
    finally:
        for handle in handles:
            handle.remove()


class LocalResponseNormSeen(TorchFunctionMode):
    """Recognises contrast normalisation as a call, five ops below that, and notes grad mode."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if func is torch._C._set_grad_enabled and not args[0] and not recorder.paused:
            recorder.tape.gradients_off.append(recorder.place()["module"])
        if not recorder.paused and args and isinstance(args[0], Tensor):
            self._note(func, args[0])
        if func is not F.local_response_norm or recorder.paused:
            return func(*args, **kwargs)
        tensor = args[0] if args else kwargs["input"]
        if recorder.value_of(tensor) is None:
            return func(*args, **kwargs)
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        return recorder.composite("local_response_norm", func, dict(bound.arguments))

    def _note(self, func: Any, tensor: Tensor) -> None:
        """Notes what no aten op shows: values handed to Python, memory exchanged behind a tensor."""
        recorder = self.recorder
        reads = func in _READS
        exchanges = func == torch.Tensor.data.__set__  # type: ignore[attr-defined]
        if (reads or exchanges) and recorder.value_of(tensor) is not None:
            what = "hands values of an activation to Python" if reads else "exchanges its memory"
            recorder.tape.faults.append(
                f"{getattr(func, '__name__', func)} in {recorder.place()['module'] or 'the model'} {what}"
            )


@contextmanager
def custom_functions_noted(recorder: Recorder) -> Iterator[None]:
    """Notes every ``autograd.Function`` of the user's: it states a derivative that no rule knows."""

    def noted(run: Callable[[], Any], function: type, tensors: list[Tensor]) -> Any:
        if not recorder.paused and any(recorder.value_of(tensor) is not None for tensor in tensors):
            recorder.tape.faults.append(
                f"{function.__name__} in {recorder.place()['module'] or 'the model'} is a custom "
                f"autograd Function, whose backward only autograd knows"
            )
        return run()

    with _around_custom_functions(noted):
        yield


@contextmanager
def custom_functions_save_with(hooks: saved_tensors_hooks) -> Iterator[None]:
    """What an ``autograd.Function`` of the user's saves goes to these hooks before all others.

    Those of a checkpoint would run the function again, where rectifiers cannot be seen.
    """

    def saving(run: Callable[[], Any], function: type, tensors: list[Tensor]) -> Any:
        with hooks:
            return run()

    with _around_custom_functions(saving):
        yield


@contextmanager
def _around_custom_functions(
    call: Callable[[Callable[[], Any], type, list[Tensor]], Any],
) -> Iterator[None]:
    base = torch.autograd.Function
    original = base.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        bound = original.__get__(None, cls)  # a C method from PyTorch 2.15 on
        return call(partial(bound, *args, **kwargs), cls, tensors)

    base.apply = classmethod(apply)
    try:
        yield
    finally:
        base.apply = original

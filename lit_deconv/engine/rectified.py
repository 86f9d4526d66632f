"""A function mode in which autograd's backward is the deconvnet's: rectifiers rectify signals."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lit_deconv.engine.backwards import Ambiguous, Local, Passed, Rectified, Scaled
from lit_deconv.engine.calls import Call, Place, is_zero
from lit_deconv.engine.errors import UnsupportedOp
from lit_deconv.engine.gates import Gates
from lit_deconv.engine.masks import Masks
from lit_deconv.engine.recognise import UNSEEN
from lit_deconv.engine.saved import SavedValues, memory
from lit_deconv.engine.statistics import SCALES

RECTIFIERS = frozenset(
    {
        "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu",
        "mish", "softplus", "hardswish",
    }
)  # fmt: skip
# Rectifiers only where these arguments are 0: position in the call, name, default.
_BOUNDS: dict[str, tuple[tuple[int, str, float | None], ...]] = {
    "clamp": ((1, "min", None),),
    "clip": ((1, "min", None),),
    "clamp_min": ((1, "min", None),),
    "hardtanh": ((1, "min_val", -1.0),),
    "threshold": ((1, "threshold", None), (2, "value", None)),
}
_MAXIMA = frozenset({"maximum", "max", "fmax"})
# Where in the call the factors of a product stand.
_ELEMENTWISE = {
    **dict.fromkeys(("mul", "multiply", "div", "divide", "true_divide"), (0, 1)),
    **dict.fromkeys(("addcmul", "addcdiv"), (1, 2)),
}
_CONTRACTIONS = {
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "dot", "inner", "outer", "kron"), (0, 1)),
    **dict.fromkeys(("baddbmm", "addbmm", "addmm", "addmv", "addr"), (1, 2)),
    **dict.fromkeys(("linear", "bilinear", "tensordot"), (0, 1)),
    **dict.fromkeys([f"conv{n}d" for n in (1, 2, 3)], (0, 1)),
    **dict.fromkeys([f"conv_transpose{n}d" for n in (1, 2, 3)], (0, 1)),
}
# Functions of one activation whose quotients, products and rectifiers inside are none of the model's.
_CLOSED = frozenset(
    {"local_response_norm", "softsign", "threshold", "lp_pool1d", "lp_pool2d", "lp_pool3d"}
)
# Autograd refuses to write in place to one of several views; to a single view it can be written.
_SEVERAL_VIEWS = frozenset(
    {"chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "unbind"}
)


class RectifiedBackward(TorchFunctionMode):
    """While it is on, what depends on the watched tensors gets the deconvnet's backward.

    The forward computes what it always does. Gradients stay on for whatever depends on the
    watched tensors, also in a ``no_grad`` block of the model: only ``detach`` stops the signal.

    Args:
        gates: "constant" keeps the gate of a product, and the statistics of a normalisation, as
            constants; "gradient" takes the plain derivative of both.
        lrn: "pass" hands the signal through local response normalisation unchanged (Zeiler &
            Fergus 2014 pass contrast normalisation through); "gradient" takes the derivative.
        where: Says which module is running, for messages.
        hooks: Whether hooks that the model puts on its activations are called with the signal.

    Raises:
        ValueError: ``gates`` or ``lrn`` is none of the above.
    """

    def __init__(
        self,
        *,
        gates: str = "constant",
        lrn: str = "pass",
        where: Callable[[], str] = lambda: "the model",
        hooks: bool = True,
    ) -> None:
        super().__init__()
        if gates not in ("constant", "gradient"):
            raise ValueError(f"gates={gates!r}; expected 'constant' or 'gradient'")
        if lrn not in ("pass", "gradient"):
            raise ValueError(f"lrn={lrn!r}; expected 'pass' or 'gradient'")
        self.gates, self.lrn, self.where, self.hooks = gates, lrn, where, hooks
        self.saved = SavedValues()
        self.before_write: Callable[[Tensor], None] = lambda tensor: None
        self._depends: dict[Any, bool] = {}
        self._gates = Gates()
        self._detached: dict[int, weakref.ref[Tensor]] = {}
        self._masks = Masks()

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Follows what is computed from these tensors; a leaf is not followed, a clone of it is."""
        for tensor in tensors:
            if tensor.grad_fn is not None:
                self._depends[tensor.grad_fn] = True

    def depends(self, tensor: Any) -> bool:
        """Whether a tensor was computed from the watched ones, and not detached from them."""
        while isinstance(tensor, Tensor) and is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        if not isinstance(tensor, Tensor) or not tensor.requires_grad or tensor.is_leaf:
            return False
        return self.node_depends(tensor.grad_fn)

    def node_depends(self, node: Any) -> bool:
        """The same of a node in autograd's graph."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top not in self._depends:
                parents = [parent for parent, _ in top.next_functions if parent is not None]
                unknown = [parent for parent in parents if parent not in self._depends]
                if unknown:
                    stack.extend(unknown)
                    continue
                self._depends[top] = any(self._depends[parent] for parent in parents)
            stack.pop()
        return self._depends[node]

    def __enter__(self) -> RectifiedBackward:
        self.saved.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.saved.__exit__()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            return None  # a no_grad block in the model is seen through
        call = Call(func, args, kwargs or {})
        followed = any(self.depends(tensor) for tensor in call.tensors)
        if followed:
            self._refuse_unseen(call)
            if func is Tensor.register_hook and not self.hooks:
                return RemovableHandle(OrderedDict())
        for tensor in call.written:
            self.saved.before_write(tensor)
            self.before_write(tensor)
        if not followed:
            if call.in_place:
                self._refuse_hidden_write(call)
                with torch.no_grad():  # what the model writes to its own parameters
                    return call.run()
            result = call.run()
            self._masks.follow(call, result)
            return result
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            # Above the hooks of a checkpoint: recomputed, rectifiers would run unseen.
            stack.enter_context(self.saved)
            call = call.without_inference_tensors()
            source = call.first if self.depends(call.first) else None
            version = source._version if source is not None else 0
            result = self._answer(call)
            self._masks.follow(call, result)
            if source is not None:
                self._note(call, source, version, result)
            return result

    def _note(self, call: Call, source: Tensor, version: int, result: Any) -> None:
        """Remembers where gates came from."""
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if any(_detached(found, source) for found in results):
            self._detached[memory(source)] = weakref.ref(source)
        elif call.name != "dropout" or not call.argument(2, "training", True):
            self._gates.follow(call.name, source, version, results)

    def _refuse_unseen(self, call: Call) -> None:
        """Refuses what takes an activation to where no function mode sees what becomes of it."""
        if call.func in UNSEEN:
            raise UnsupportedOp(
                f"{call.name} in {self.where()} takes an activation out of PyTorch, where the signal "
                f"cannot follow; give it a detached copy (y.detach().clone()) if it is not meant to"
            )
        if any(is_functorch_wrapped_tensor(tensor) for tensor in call.tensors):
            raise UnsupportedOp(
                f"{call.name} in {self.where()} runs under torch.vmap or another transform of "
                f"torch.func, where rectifiers and gates cannot be told; write it without"
            )

    def _refuse_hidden_write(self, call: Call) -> None:
        """Refuses to write to an activation through a detached alias of it, unseen by autograd."""
        for tensor in call.written:
            activation = self._detached.get(memory(tensor), lambda: None)()
            if activation is not None and memory(activation) == memory(tensor):
                raise UnsupportedOp(
                    f"{call.name} in {self.where()} overwrites an activation through .data or "
                    f"detach(), where the signal cannot follow; write to the activation itself"
                )

    # ---- what each call becomes ----------------------------------------------------------

    def _answer(self, call: Call) -> Any:
        if call.kwargs.get("out") is not None:
            return self._answer_into(call)
        tensor = call.first
        if call.name in _SEVERAL_VIEWS and self.depends(tensor):
            return _single_views(call)
        rectified = self._rectified_argument(call)
        if rectified is not None:
            return _written(call, Rectified.apply(rectified, _as_function(call, rectified)))
        if call.name in _CLOSED and self.depends(tensor):
            if call.name == "local_response_norm" and self.lrn == "pass":
                return Passed.apply(tensor, _as_function(call, tensor))
            return Local.apply(tensor, _as_function(call, tensor))
        if self.gates == "constant":
            if call.name == "glu":
                signal, gate = tensor.chunk(2, call.argument(1, "dim", -1))
                return signal * gate.detach().sigmoid()
            if call.name in SCALES and call.opens and self.depends(tensor):
                scale = SCALES[call.name](**call.bound)
                if scale is not None:
                    return Scaled.apply(tensor, _as_function(call, tensor), scale)
            constants = self._constants(call)
            if constants:
                detached = {place: tensor.detach() for place, tensor in constants.items()}
                return call.at(detached).run()
        factors = self._factors(call)
        if len(factors) > 1:
            return self._product(call.flat if call.name == "einsum" else call, factors)
        if call.opens:
            with self:
                return call.run_opened()
        if call.name == "avg_pool2d" and tensor.is_cuda:
            # Its backward is wrong for a padded pool of channels_last maps (pytorch #188344).
            call = call.at(
                {place: map_.contiguous() for place, map_ in call.placed((0, "input")).items()}
            )
        return call.run()

    def _answer_into(self, call: Call) -> Tensor:
        out = call.kwargs["out"]
        value = self._answer(
            call.replaced(kwargs={k: v for k, v in call.kwargs.items() if k != "out"})
        )
        if not isinstance(out, Tensor) or out.shape != value.shape:
            raise UnsupportedOp(
                f"{call.name} in {self.where()} is given out= of another shape than its result; "
                f"write the op without out="
            )
        return out.copy_(value)

    def _rectified_argument(self, call: Call) -> Tensor | None:
        """The tensor that a call rectifies, None where it is no rectifier."""
        first = call.first
        if call.name in RECTIFIERS:
            return first if self.depends(first) else None
        if call.name in _BOUNDS:
            bounds = [call.argument(*bound) for bound in _BOUNDS[call.name]]
            return first if self.depends(first) and all(map(self._is_bound, bounds)) else None
        if call.name in _MAXIMA:
            second = call.argument(1, "other")
            for tensor, bound in ((first, second), (second, first)):
                if self.depends(tensor) and isinstance(bound, Tensor) and self._is_bound(bound):
                    return tensor
        by_hand = self._masks.rectified(call, self.depends)
        if by_hand is not None and self.depends(by_hand):
            return by_hand
        if call.name in ("mul", "multiply"):
            second = call.argument(1, "other")
            if self.depends(first) and self.depends(second):
                return self._gates.gated_by_itself(first, second)
        return None

    def _is_bound(self, value: Any) -> bool:
        """Whether a bound is 0, and not only because an activation is 0 for these images."""
        return not self.depends(value) and is_zero(value)

    def _constants(self, call: Call) -> dict[Place, Tensor]:
        """Arguments that act as gates whatever they are: attention weights, sampling positions."""
        if call.name == "scaled_dot_product_attention" and self.depends(call.argument(2, "value")):
            return call.placed((0, "query"), (1, "key"))
        if call.name == "grid_sample" and self.depends(call.first):
            return call.placed((1, "grid"))
        if call.name == "deform_conv2d" and self.depends(call.first):
            return call.placed((2, "offset"), (3, "mask"))
        return {}

    def _factors(self, call: Call) -> dict[Place, Tensor]:
        """The activations that a call multiplies, by their place in it."""
        if call.name == "einsum":
            call = call.flat
            factors: dict[Place, Any] = dict(enumerate(call.args))
        elif call.name in _ELEMENTWISE or call.name in _CONTRACTIONS:
            positions = _ELEMENTWISE.get(call.name) or _CONTRACTIONS[call.name]
            summands = {"bias"} if positions == (0, 1) else {"input", "self"}
            factors = {place: call.args[place] for place in positions if place < len(call.args)}
            factors |= {name: call.kwargs[name] for name in call.kwargs if name not in summands}
        else:
            return {}
        return {place: value for place, value in factors.items() if self.depends(value)}

    def _product(self, call: Call, factors: dict[Place, Tensor]) -> Any:
        if self.gates == "gradient":
            return call.run()
        gates = self._gates.choose(factors, call.name in _ELEMENTWISE)
        if gates is not None:
            constants = {place: factors[place].detach() for place in gates}
            if call.in_place and 0 in constants:
                # The gate is overwritten: what it becomes depends on the other factor alone.
                constants[0] = constants[0].clone()
                return call.first.copy_(call.at(constants).run())
            return call.at(constants).run()
        message = (
            f"{call.name} in {self.where()} multiplies activations of shapes "
            f"{' and '.join(str(tuple(factor.shape)) for factor in factors.values())}; expected that "
            f"all but one are gates (made by sigmoid, hardsigmoid or softmax, or broadcast over the "
            f"map), so that the signal has one way; gates='gradient' asks for the product rule"
        )
        instead = {id(call.first): call.first.detach().clone()} if call.in_place else None
        return _written(call, Ambiguous.apply(message, lambda: call.run(instead), *call.tensors))


def _detached(found: Tensor, source: Tensor) -> bool:
    return not found.requires_grad and memory(found) == memory(source)


def _as_function(call: Call, tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """The call as a function of one of its arguments that leaves all of them alone."""

    def function(x: Tensor) -> Any:
        if not call.in_place:
            return call.run({id(tensor): x})
        target = call.first
        written = (x if target is tensor else target.detach()).clone()
        call.run({id(tensor): x, id(target): written})
        return written

    return function


def _written(call: Call, value: Tensor) -> Tensor:
    """What the call returns, after an in-place call has overwritten its argument."""
    # copy_ is right on views too, and whether or not the caller uses what is returned.
    return call.first.copy_(value) if call.in_place else value


def _single_views(call: Call) -> tuple[Tensor, ...]:
    """What chunk and its like return, each a view of its own that may be written in place."""
    tensor = call.first
    views = call.run({id(tensor): tensor.detach()})
    return tuple(
        tensor.as_strided(view.shape, view.stride(), view.storage_offset()) for view in views
    )


@contextmanager
def inference_mode_ignored() -> Iterator[None]:
    """Inference-mode blocks of the model are seen through, as ``no_grad`` blocks are.

    In such a block autograd would lose what runs past the mode, as custom Functions do.
    """
    original = torch.inference_mode.__enter__

    def enter(block: torch.inference_mode) -> None:
        wanted, block.mode = block.mode, False
        try:
            original(block)
        finally:
            block.mode = wanted

    torch.inference_mode.__enter__ = enter  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.inference_mode.__enter__ = original  # type: ignore[method-assign]

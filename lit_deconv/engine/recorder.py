"""Records a forward pass on a tape, by watching the aten ops that it runs.

The recorder knows nothing of how an op is reversed. It asks the registry which ops have a rule (the
others are decomposed where PyTorch can) and what a rule wants kept.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_deconv.engine.configuration import tensors_of
from lit_deconv.engine.errors import DeconvError, LayerError, UnsupportedOp
from lit_deconv.engine.overload import Overload, decomposed, overload_of
from lit_deconv.engine.recognise import LocalResponseNormSeen, custom_functions_noted, seen_last
from lit_deconv.engine.registry import Rule, Run, rule_for
from lit_deconv.engine.tape import Op, Options, Tape, Value, with_tensors

# Ops that read only the shape, dtype or device of a tensor: what they return is a constant.
_SHAPE_ONLY = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "sym_size", "size",
    "sym_stride", "stride", "sym_numel", "numel", "dim", "is_same_size",
    "sym_storage_offset", "storage_offset", "is_contiguous", "prim_layout", "device",
}  # fmt: skip
# Ops that hand an activation's value to Python, where the tape cannot follow it.
_READS_TO_PYTHON = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "allclose", "masked_select",
    "_unique", "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip
# Ops whose result is a constant to the signal.
_STOPS = {"detach"}


class _Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no model catches it."""


def record(
    forward: Callable[..., Any],
    inputs: Sequence[Tensor],
    layers: Mapping[str, nn.Module],
    *,
    model: nn.Module,
    call: int | None = None,
    options: Options | None = None,
    stop_early: bool = False,
    choose: Callable[[str, Any], Tensor] | None = None,
    exact: int | None = None,
) -> Tape:
    """Runs ``forward(*inputs)`` and records it up to the last of ``layers``.

    Args:
        forward: Calls the model; extra arguments are bound in it already.
        inputs: Tensors to track, each [N, ...]; they are not changed (an in-place first op gets a copy).
        layers: The modules whose outputs are wanted, by name.
        model: Names the modules for messages.
        call: Which call of a layer is meant where it runs more than once; None takes the first.
        options: Choices that rules need while recording.
        stop_early: Leave the forward when every layer has run as often as ``call`` asks; otherwise the
            rest of it runs unrecorded, so that ``calls`` is the whole count.
        choose: Picks the feature map out of a layer's output that is no single tensor.
        exact: How many ops, from the first, are to give the model's own values to the bit; those
            behind may be rounded otherwise, and take what the last of these gives however it lies in
            memory. None for all.

    Returns:
        The tape.

    Raises:
        LayerError: A layer was never reached, or its output does not depend on the input.
    """
    recorder = Recorder(
        inputs, layers, model, call, options or Options(), stop_early, choose or only_tensor, exact
    )
    with ExitStack() as stack:
        stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        stack.enter_context(custom_functions_noted(recorder))
        stack.enter_context(recorder.module_hooks())
        stack.enter_context(LocalResponseNormSeen(recorder))
        stack.enter_context(recorder)
        try:
            forward(*recorder.tensors)
            recorder.tape.complete = True
        except _Stop:
            pass
        except DeconvError:
            raise
        except Exception as error:
            # What PyTorch raises where a mode meets an operator with branches: "HOP" up to 2.6.
            of_higher_order = re.search(r"HigherOrderOperator|\bHOP\b", str(error))
            if isinstance(error, NotImplementedError) and of_higher_order:
                raise UnsupportedOp(
                    f"{recorder.place()['module'] or 'the model'} runs a control-flow operator such as "
                    f"torch.cond, whose branches cannot be recorded; write it as Python's own if"
                ) from error
            # Behind the last layer nothing is recorded; a head that does not fit the input
            # size is no business of a reconstruction.
            if not recorder.done:
                raise
        finally:
            recorder.put_state_back()
    return recorder.finished()


def only_tensor(layer: str, output: Any) -> Tensor:
    """The tensor in a layer's output when there is just one.

    Raises:
        LayerError: The layer returned none, or several.
    """
    found = tree_leaves(output)
    if hasattr(output, "__dataclass_fields__"):
        found = [getattr(output, name) for name in output.__dataclass_fields__]
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    raise LayerError(
        f"layer {layer!r} returned {len(tensors)} tensors in a {type(output).__name__}; expected one "
        f"feature map: choose a layer inside it, or say which one with output=<index or key>"
    )


class Recorder(TorchDispatchMode):
    """Watches a forward pass; ``record`` runs it. See there for the arguments."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        layers: Mapping[str, nn.Module],
        model: nn.Module,
        call: int | None,
        options: Options,
        stop_early: bool,
        choose: Callable[[str, Any], Tensor],
        exact: int | None,
    ) -> None:
        super().__init__()
        modules = list(model.named_modules())
        self.tape = Tape(
            samples=inputs[0].shape[0],
            device=inputs[0].device,
            call=call,
            relus=frozenset(
                name
                for name, module in modules
                if isinstance(module, nn.ReLU) and type(module).forward is nn.ReLU.forward
            ),
        )
        self.options = options
        self.call, self.stop_early, self.choose = call, stop_early, choose
        self.exact = exact
        self.names = {id(module): name for name, module in modules}
        self.wanted: dict[int, list[str]] = {}
        for name, module in layers.items():
            self.wanted.setdefault(id(module), []).append(name)
        self.layers = dict(layers)
        self.running: list[nn.Module] = []
        self.values = _ValueOfTensor()
        self.generation: dict[int, int] = {}
        self.memory: dict[int, StorageWeakRef] = {}
        self.paused = False
        self.state = {
            _memory_of(tensor): tensor
            for tensor in tensors_of(model)
            if tensor.device.type != "meta"
        }
        self.saved: list[tuple[Tensor, Tensor]] = []
        self.readers: dict[int, list[Op]] = {}  # which ops hold a constant in this memory
        self.tensors = [tensor.detach().clone() for tensor in inputs]
        for tensor in self.tensors:
            op = Op("input")
            self.tape.ops.append(op)
            self.tape.inputs.append(self._track(tensor, op))

    # ---- modules -------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether everything asked for is on the tape."""
        if self.call is not None and self.call < 0:
            return False
        return all(self.tape.calls.get(name, 0) > (self.call or 0) for name in self.layers)

    @contextmanager
    def module_hooks(self) -> Iterator[None]:
        """Follows which module runs, with hooks on the class of modules: none is put on the model."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            while self.running and self.running.pop() is not module:
                pass  # modules left by an exception that the model caught
            if isinstance(module, nn.ReLU) and args and output is args[0]:
                output = self._returned(module, output)
            if not has_own_hooks(module):
                ran(module, output)
            return output

        def ran(module: nn.Module, output: Any) -> None:
            for name in self.wanted.get(id(module), ()):
                self._layer_ran(name, output)

        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            with seen_last(self.layers.values(), ran) as has_own_hooks:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _returned(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """What an in-place ReLU returns, apart from the tensor that it overwrote.

        The two are one tensor. Captum, though, hands a copy to the module, so that whoever reads the
        overwritten tensor and not the returned one reads something else there.
        """
        value = None if self.paused else self.value_of(tensor)
        if value is None:
            return tensor
        self.paused = True
        returned = torch.ops.aten.alias(tensor)
        self.paused = False
        self.values[returned] = value
        op = Op(
            "alias",
            {"self": value},
            module=self.names.get(id(module), ""),
            module_type=type(module).__name__,
            rule=rule_for("alias"),
            func=torch.ops.aten.alias.default,
        )
        self.tape.ops.append(op)
        self._track(tensor, op)
        return returned

    def _layer_ran(self, name: str, output: Any) -> None:
        count = self.tape.calls[name] = self.tape.calls.get(name, 0) + 1
        wanted = self.call or 0
        keep = wanted < 0 or count == wanted + 1
        if keep and not self.paused:
            tensor = self.choose(name, output)
            value = self.value_of(tensor)
            if value is not None and not value.constant:
                self.tape.layers[name] = value
                self.paused = True
                # What may lie otherwise in memory than the model lays it, lies as PyTorch does.
                whole = self.exact is None
                layout = torch.preserve_format if whole else torch.contiguous_format
                self.tape.activations[name] = tensor.clone(memory_format=layout)
                self.paused = False
        if self.done:
            self.paused = True
            if self.stop_early:
                raise _Stop

    def finished(self) -> Tape:
        """The tape, when every layer was seen."""
        for name in self.layers:
            if not self.tape.calls.get(name):
                raise LayerError(
                    f"layer {name!r} did not run in this forward pass; choose a layer that the model "
                    f"calls for this input (a layer called by its function or weights is not seen)"
                )
            if self.call is not None and self.call >= self.tape.calls[name]:
                raise LayerError(
                    f"layer {name!r} ran {self.tape.calls[name]} times; call={self.call} asks for one more"
                )
            if name not in self.tape.layers:
                raise LayerError(
                    f"the output of layer {name!r} does not depend on the input that was given; "
                    f"choose a layer on the way from the input"
                )
        return self.tape

    # ---- tensors -------------------------------------------------------------------------

    def _storage(self, tensor: Tensor) -> int:
        key = _memory_of(tensor)
        if key not in self.memory:
            # Held, so that the key cannot be given to other memory while the tape is being made.
            self.memory[key] = StorageWeakRef(tensor.untyped_storage())
        return key

    def _track(self, tensor: Tensor, op: Op) -> Value:
        storage = self._storage(tensor)
        generation = self.generation.setdefault(storage, 0)
        starts = op.name == "input" or (op.fault is not None and not op.arguments)
        constant = not starts and (
            op.name in _STOPS
            or not (tensor.is_floating_point() or tensor.is_complex())
            or all(parent.constant for parent in op.parents)
        )
        if tensor.is_complex() and not constant and not starts:
            op.fault = op.fault or "gives complex numbers, which rules do not carry"
        value = Value(weakref.ref(op), tensor.shape, tensor.dtype, storage, generation, constant)
        self.values[tensor] = value
        op.outputs.append(value)
        return value

    def value_of(self, tensor: Tensor) -> Value | None:
        """The value of a tensor, a faulty one where its memory was written behind the tape's back."""
        value = self.values.get(tensor)
        if value is not None:
            if value.generation == self.generation[value.storage]:
                return value
            why = "reads an activation that was overwritten in place through another view"
        elif _memory_of(tensor) in self.generation:
            why = "reads memory that an activation shares in a way that is not recorded"
        else:
            return None
        # A stand-in on the tape: a signal that comes this way is refused, not lost.
        op = Op("alias", fault=why, **self.place())
        self.tape.ops.append(op)
        return self._track(tensor, op)

    def place(self) -> dict[str, Any]:
        """The innermost module that is running, as arguments for ``Op``."""
        if not self.running:
            return {"module": "", "module_type": ""}
        module = self.running[-1]
        return {"module": self.names.get(id(module), ""), "module_type": type(module).__name__}

    # ---- ops -----------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        overload = overload_of(func)
        bound = overload.bound(args, kwargs)
        if overload.written:
            self._save_state(overload.written_in(bound))
        if self.paused:
            return func(*args, **kwargs)
        tensors = overload.tensors(bound)
        values = {
            id(tensor): value for tensor in tensors if (value := self.value_of(tensor)) is not None
        }
        if not values:
            return func(*args, **kwargs)
        name = overload.name
        if name in _SHAPE_ONLY:
            return func(*args, **kwargs)
        rule = rule_for(name)
        if rule is None or overload.shorthand:
            with self:
                result = decomposed(func, overload, args, kwargs)
            if result is not NotImplemented:
                return result
        picks = name == "index" and any(
            tensor.dtype == torch.bool and id(tensor) in values for tensor in tensors
        )
        if name in _READS_TO_PYTHON or picks:
            self.tape.faults.append(
                f"{name} in {self.place()['module'] or 'the model'} hands a value of an activation to "
                f"Python: what the forward does may depend on it"
            )
        constants = [tensor for tensor in tensors if id(tensor) not in values]
        op = Op(name, rule=rule, func=overload.out_of_place, **self.place())
        for argument, given in bound.items():
            if argument in overload.holding:
                given = with_tensors(lambda tensor: values.get(id(tensor), tensor), given)
            elif isinstance(given, list):
                given = given.copy()  # a default is the schema's own
            op.arguments[argument] = given
        for tensor in constants:
            self.readers.setdefault(_memory_of(tensor), []).append(op)
        result = self._run_and_keep(op, func, overload, args, kwargs, bound)
        self.tape.ops.append(op)
        self._track_result(result, op, overload.written_in(bound))
        return result

    def _save_state(self, written: Sequence[Tensor]) -> None:
        """Copies a parameter or buffer that the forward is about to write, to be put back at the end."""
        for tensor in written:
            self._keep_for_readers(tensor)
            owner = self.state.pop(_memory_of(tensor), None)
            if owner is not None:
                self.saved.append((owner, owner.detach().clone()))

    def _keep_for_readers(self, tensor: Tensor) -> None:
        """Gives the ops that read a constant a copy of it, before it is overwritten."""
        key = _memory_of(tensor)

        def copy(leaf: Tensor) -> Tensor:
            return leaf.detach().clone() if _memory_of(leaf) == key else leaf

        for op in self.readers.pop(key, ()):
            op.arguments = with_tensors(copy, op.arguments)
            op.kept = with_tensors(copy, op.kept)

    def put_state_back(self) -> None:
        """Undoes what the forward wrote into parameters and buffers."""
        for owner, value in self.saved:
            self._keep_for_readers(owner)
            owner.detach().copy_(value)

    def _as_argument(self, leaf: Any) -> Any:
        """A value in the place of a tensor that depends on the input."""
        value = self.value_of(leaf) if isinstance(leaf, Tensor) else None
        return leaf if value is None else value

    def _run_and_keep(
        self,
        op: Op,
        func: Any,
        overload: Overload,
        args: Any,
        kwargs: Any,
        tensors: Mapping[str, Any],
    ) -> Any:
        result: Any = None
        ran = False
        rule = op.rule
        try:
            if rule and rule.before:
                op.kept = rule.before(op, tensors, None, self.options)
            run = rule and not overload.written and self._run_of(rule)
            result = run(func, tensors) if run else func(*args, **kwargs)
            ran = True
            if rule and rule.after:
                op.kept = rule.after(op, tensors, result, self.options)
        except UnsupportedOp as error:
            # Whether it matters is known when the signal comes this way, or never does.
            op.fault = error.why or str(error)
        return result if ran else func(*args, **kwargs)

    def _run_of(self, rule: Rule) -> Run | None:
        """The fastest way to run the next op of this rule, as exact as it has to be; None: as called."""
        exact = math.inf if self.exact is None else self.exact
        if rule.run_rounded and len(self.tape.ops) >= exact:
            return rule.run_rounded
        # What the last of them gives goes to ops alone that take it however it lies.
        last = len(self.tape.ops) + 1 >= exact
        return (last and rule.run_laid) or rule.run

    def _track_result(self, result: Any, op: Op, written: list[Tensor]) -> None:
        for tensor in written:
            storage = self._storage(tensor)
            self.generation[storage] = self.generation.get(storage, 0) + 1
        overwritten = {id(tensor) for tensor in written}
        outputs = result if isinstance(result, (tuple, list)) else [result]
        for output in outputs:
            if not isinstance(output, Tensor):
                op.outputs.append(None)
            elif self.values.get(output) is not None and id(output) not in overwritten:
                op.outputs.append(None)  # the op handed its argument through: nothing to reverse
            else:
                self._track(output, op)

    def composite(
        self, name: str, function: Callable[..., Tensor], arguments: dict[str, Any]
    ) -> Tensor:
        """Records a whole function as one op, none of the ops inside it."""
        op = Op(name, rule=rule_for(name), func=function, **self.place())
        op.arguments = {key: self._as_argument(leaf) for key, leaf in arguments.items()}
        self.paused = True
        try:
            result = function(**arguments)
        finally:
            self.paused = False
        self.tape.ops.append(op)
        self._track(result, op)
        return result


class _ValueOfTensor:
    """The value of each tensor; of one that is gone none. Torch's own dictionary of this kind is slow."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        """The tensor's value, None where it has none."""
        found = self._found.get(id(tensor))
        # The number of one that is gone may have been given to another.
        return found[1] if found is not None and found[0]() is tensor else None

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._found[id(tensor)] = weakref.ref(tensor), value


def _memory_of(tensor: Tensor) -> int:
    """A number for the memory that a tensor lies in, the same for its views."""
    return tensor.untyped_storage()._cdata

"""The reverse pass through autograd: needs no rules, so it is the fallback and the cross-check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_deconv.engine.audit import recomputation_refused, refuse_unseen
from lit_deconv.engine.errors import DeconvError, LayerError, UnsupportedOp
from lit_deconv.engine.mixing import Mixing
from lit_deconv.engine.recognise import custom_functions_save_with, seen_last
from lit_deconv.engine.rectified import RectifiedBackward, inference_mode_ignored
from lit_deconv.engine.saved import backward_hooks_off, state_kept


def record_autograd(
    forward: Callable[..., Any],
    inputs: Sequence[Tensor],
    layers: Mapping[str, nn.Module],
    *,
    model: nn.Module | None = None,
    call: int | None = None,
    gates: str = "constant",
    lrn: str = "pass",
    stop_early: bool = False,
    choose: Callable[[str, Any], Tensor] | None = None,
) -> AutogradRecording:
    """Runs ``forward(*inputs)`` once with a rectifying backward, for any number of walks.

    Works in any grad mode and in inference mode. Eval mode and random state are the caller's.

    Args:
        forward: Calls the model; extra arguments are bound in it already.
        inputs: Tensors, each [N, ...]; they are not changed and need not require grad.
        layers: The modules whose outputs are wanted, by name.
        model: Names the modules for messages.
        call: Which call of a layer is meant where it runs more than once; None takes the first,
            -1 the last.
        gates: "constant" or "gradient", see ``RectifiedBackward``.
        lrn: "pass" or "gradient", see ``RectifiedBackward``.
        stop_early: Leave the forward when every layer has run as often as ``call`` asks.
        choose: Picks the feature map out of a layer's output that is no single tensor; by default
            the first tensor in it.

    Returns:
        The recording.

    Raises:
        LayerError: A layer was never reached, or its output does not depend on the input.
        UnsupportedOp: The forward writes in place where autograd cannot follow.
    """
    recorder = _Recorder(layers, model, call, stop_early, choose or _first_tensor)
    mode = RectifiedBackward(gates=gates, lrn=lrn, where=recorder.where, hooks=False)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = tuple(_leaf(tensor) for tensor in inputs)
        # A non-leaf is fed, so that the model may write to its input in place.
        fed = [leaf.clone() for leaf in leaves]
        mode.watch(fed)
        with (
            state_kept(model, mode.saved) as mode.before_write,
            backward_hooks_off(model),
            recorder.module_hooks(),
            inference_mode_ignored(),
            custom_functions_save_with(mode.saved),
            mode,
            _in_place_refusals(recorder.where),
        ):
            try:
                forward(*fed)
            except _Stop:
                pass
            except DeconvError:
                raise
            except Exception:
                # A head that does not fit the input size is no business of a reconstruction.
                if not recorder.done:
                    raise
    return AutogradRecording(mode, leaves, recorder.finished(mode), recorder.calls)


class AutogradRecording:
    """One forward pass whose graph carries the deconvnet's backward.

    Args:
        mode: Knows what in the graph depends on the inputs.
        leaves: The tensors that stand for the inputs.
        captured: Each layer's output, in the graph.
        calls: How often each layer ran.

    Attributes:
        inputs: The tensors that stand for the inputs, each [N, ...].
        outputs: Each layer's output as the layer returned it, [N, ...].
        calls: How often each layer ran.
    """

    def __init__(
        self,
        mode: RectifiedBackward,
        leaves: tuple[Tensor, ...],
        captured: Mapping[str, Tensor],
        calls: Mapping[str, int],
    ) -> None:
        self._mode = mode
        self._audited: set[str] = set()
        self._mixing: dict[str, Mixing] = {}
        self.inputs = leaves
        self._captured = dict(captured)
        self.outputs: dict[str, Tensor] = {name: map_.detach() for name, map_ in captured.items()}
        self.calls: dict[str, int] = dict(calls)

    def walk(self, layer: str, seed: Tensor) -> tuple[Tensor, ...]:
        """Takes a seed back to the inputs.

        Args:
            layer: The layer's name.
            seed: The signal that starts at the layer's output, of that output's shape.

        Returns:
            One reconstruction per input, zero where the layer does not depend on it.

        Raises:
            AmbiguousProduct: The signal meets a product of two activations without one gate.
            UnsupportedOp: The signal meets ops that ran unseen, such as scripted ones.
        """
        captured = self._captured[layer]
        if seed.shape != captured.shape:
            raise ValueError(
                f"a seed of shape {tuple(seed.shape)} was given for layer {layer!r}, whose output "
                f"has shape {tuple(captured.shape)}: give one of that shape"
            )
        if layer not in self._audited:
            refuse_unseen(self._mode, [captured])
            self._audited.add(layer)
        sources = [leaf for leaf in self.inputs if leaf.requires_grad]
        with torch.inference_mode(False), torch.enable_grad(), recomputation_refused():
            signals = iter(
                torch.autograd.grad(
                    captured,
                    sources,
                    seed.detach().to(captured.dtype, copy=True),
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        return tuple(
            _or_zeros(next(signals) if leaf.requires_grad else None, leaf) for leaf in self.inputs
        )

    def walk_units(self, layer: str, samples: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
        """Takes one seed per unit back to the inputs, at most one unit of a sample at a time.

        Args:
            layer: The layer's name.
            samples: The sample that each unit belongs to, [U].
            seeds: One seed map per unit, [U, *map shape].

        Returns:
            One reconstruction per unit for each input, [U, *input shape].

        Raises:
            UnsupportedOp: An input has neither as many samples as the others nor one for all of them.
        """
        count = max(map(len, self.inputs))
        for number, leaf in enumerate(self.inputs):
            if len(leaf) not in (1, count):
                raise UnsupportedOp(
                    f"input {number} has {len(leaf)} samples, another one {count}: which of them belong "
                    f"to a unit cannot be told; give one for each image, or one for all"
                )
        captured = self._captured[layer]
        results = tuple(
            leaf.new_zeros((len(samples), *leaf.shape[1:])).detach() for leaf in self.inputs
        )
        if layer not in self._mixing:
            self._mixing[layer] = Mixing(captured, [len(leaf) for leaf in self.inputs])
        for units in self._mixing[layer].rounds(partial(self.walk, layer), samples):
            seed = torch.zeros_like(captured)
            chosen = samples[units]
            seed[chosen] = seeds[units].to(seed.dtype)
            for result, signal in zip(results, self.walk(layer, seed), strict=True):
                result[units] = signal if len(signal) == 1 else signal[chosen]
        return results


# ---- recording ---------------------------------------------------------------------------


class _Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no model catches it."""


class _Recorder:
    """Follows which module runs and keeps the outputs of the chosen ones."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        model: nn.Module | None,
        call: int | None,
        stop_early: bool,
        choose: Callable[[str, Any], Tensor],
    ) -> None:
        self.layers = dict(layers)
        self.wanted_call, self.stop_early, self.choose = call, stop_early, choose
        self.names = {id(m): name for name, m in model.named_modules()} if model else {}
        self.running: list[nn.Module] = []
        self.calls: dict[str, int] = {}
        self.captured: dict[str, Tensor] = {}

    @property
    def done(self) -> bool:
        """Whether every layer ran as often as is asked."""
        wanted = self.wanted_call or 0
        return wanted >= 0 and all(self.calls.get(name, 0) > wanted for name in self.layers)

    def where(self) -> str:
        """The module that is running, for messages."""
        if not self.running:
            return "the model"
        module = self.running[-1]
        name, kind = self.names.get(id(module)), type(module).__name__
        return f"{name} ({kind})" if name else kind

    @contextmanager
    def module_hooks(self) -> Iterator[None]:
        """Hooks on the class of modules: none is put on the model."""

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while self.running and self.running.pop() is not module:
                pass  # modules left by an exception that the model caught
            if not has_own_hooks(module):
                ran(module, output)

        def ran(module: nn.Module, output: Any) -> None:
            for name, layer in self.layers.items():
                if layer is module:
                    self._layer_ran(name, output)
            if self.done and self.stop_early:
                raise _Stop

        hooks = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave),
        ]
        try:
            with seen_last(self.layers.values(), ran) as has_own_hooks:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _layer_ran(self, name: str, output: Any) -> None:
        count = self.calls[name] = self.calls.get(name, 0) + 1
        wanted = self.wanted_call or 0
        if wanted < 0 or count == wanted + 1:
            # A clone holds the layer's place in the graph: an in-place op that follows moves the
            # output itself behind that op.
            self.captured[name] = self.choose(name, output).clone()

    def finished(self, mode: RectifiedBackward) -> dict[str, Tensor]:
        """What was captured, checked."""
        for name in self.layers:
            if name not in self.calls:
                raise LayerError(
                    f"layer {name!r} did not run in this forward pass; choose a layer that the "
                    f"model calls for this input (one whose weights alone are used is not seen)"
                )
            if name not in self.captured:
                raise LayerError(
                    f"layer {name!r} ran {self.calls[name]} times; call={self.wanted_call} "
                    f"asks for one more"
                )
            if not mode.depends(self.captured[name]):
                raise LayerError(
                    f"the output of layer {name!r} does not depend on the input that was given; "
                    f"choose a layer on the way from the input"
                )
        return self.captured


def _first_tensor(layer: str, output: Any) -> Tensor:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf
    raise LayerError(
        f"layer {layer!r} returned a {type(output).__name__} without a tensor in it; choose a "
        f"layer that returns a feature map"
    )


@contextmanager
def _in_place_refusals(where: Callable[[], str]) -> Iterator[None]:
    """Says which module wrote in place where autograd refuses it."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, NotImplementedError) or not ("in-place" in text or "inplace" in text):
            raise
        raise UnsupportedOp(
            f"{where()} writes in place where autograd cannot follow it ({text.splitlines()[0]}); "
            f"write the op out of place"
        ) from error


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach().clone()
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def _or_zeros(signal: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf).detach() if signal is None else signal


__all__ = ["AutogradRecording", "record_autograd"]

"""Drop-ins for Captum's ``Deconvolution`` and ``NeuronDeconvolution``, right on every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import captum.attr  # type: ignore[import-untyped]
import torch
from captum._utils.common import (  # type: ignore[import-untyped]
    _format_output,
    _format_tensor_into_tuples,
)
from captum.log import log_usage  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lit_deconv.engine.audit import recomputation_refused, refuse_unseen
from lit_deconv.engine.errors import UnsupportedOp
from lit_deconv.engine.precision import exact
from lit_deconv.engine.recognise import custom_functions_save_with
from lit_deconv.engine.rectified import RectifiedBackward, inference_mode_ignored
from lit_deconv.engine.saved import state_kept
from lit_deconv.engine.undisturbed import randomness_kept


class Deconvolution(captum.attr.Deconvolution):
    r"""Captum's ``Deconvolution`` with every rectifier treated as one.

    The gradient of the target with respect to the inputs, except that each rectifier rectifies the
    signal (https://arxiv.org/abs/1311.2901): ReLU and its relatives, as module, function, method or
    in place, whatever else reads their input, and however often a module is used. Where Captum's
    class is right, this one gives the same. Gates, local response normalisation, sigmoid and
    softmax keep their gradient, and the seed is 1, as in Captum.

    As in Captum the model runs in the mode that it is in: train mode means batch statistics and
    active dropout. Unlike there, buffers and the state of the random number generators are
    afterwards as before, the inputs are never touched, grad mode does not matter (``no_grad``,
    ``inference_mode``), and a compiled model runs as its Python code. ``nn.DataParallel`` is
    unwrapped and runs on one device.
    """

    def __init__(self, model: nn.Module) -> None:
        r"""Wraps a model.

        Args:
            model (nn.Module): The reference to PyTorch model instance.
        """
        super().__init__(model)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
    ) -> Any:
        r"""Attributes an output of the model to its inputs.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): Input for which attributions are computed;
                dimension 0 of each tensor counts the examples.
            target (int, tuple, Tensor, or list, optional): Output indices, in every form that
                Captum takes.
            additional_forward_args (Any, optional): Handed to the model behind the inputs; no
                attribution is computed for them.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, of the shape of the inputs.

        Raises:
            UnsupportedOp: A rectifier runs where it cannot be seen, as in a scripted module.

        Examples::

            >>> deconv = Deconvolution(ImageClassifier())
            >>> attribution = deconv.attribute(torch.randn(2, 3, 32, 32), target=3)
        """
        tensors = _format_tensor_into_tuples(inputs)
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            leaves = tuple(_leaf(tensor) for tensor in tensors)
            forward = stack.enter_context(_rectified(self.model, len(leaves)))
            gradients = self.gradient_func(forward, leaves, target, additional_forward_args)
        return _format_output(isinstance(inputs, tuple), gradients)


class NeuronDeconvolution(captum.attr.NeuronDeconvolution):
    r"""Captum's ``NeuronDeconvolution`` with every rectifier treated as one, see ``Deconvolution``.

    ``attribute`` takes what Captum's takes: every form of ``neuron_selector``,
    ``additional_forward_args`` and ``attribute_to_neuron_input``.
    """

    def __init__(
        self, model: nn.Module, layer: nn.Module, device_ids: list[int] | None = None
    ) -> None:
        r"""Wraps a model and a layer of it.

        Args:
            model (nn.Module): The reference to PyTorch model instance.
            layer (nn.Module): Layer whose neurons are attributed.
            device_ids (list[int]): Taken for Captum's sake; one device is enough here.
        """
        super().__init__(model, layer, device_ids)
        self.deconv = Deconvolution(model)


@contextmanager
def _rectified(model: nn.Module, inputs: int) -> Iterator[Callable[..., Any]]:
    """The model as a function whose gradient is the deconvnet's; the model is left as it was.

    Args:
        model: Any model.
        inputs: How many of the function's arguments are followed.
    """
    module: nn.Module = model
    device = None
    if isinstance(model, nn.DataParallel):
        module = model.module
        device = next((parameter.device for parameter in module.parameters()), None)
    _refuse_scripted(module)
    mode = RectifiedBackward(gates="gradient", lrn="gradient")

    def forward(*arguments: Any) -> Any:
        # Clones, so that a model that writes to its input in place may do so.
        followed = [tensor.clone() for tensor in arguments[:inputs]]
        mode.watch(followed)
        extra = tree_map(_ordinary, arguments[inputs:])
        if device is not None:
            followed, extra = tree_map(lambda leaf: _moved(leaf, device), (followed, extra))
        with inference_mode_ignored(), custom_functions_save_with(mode.saved), mode:
            outputs = module(*followed, *extra)
        refuse_unseen(mode, [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)])
        return outputs

    devices = {tensor.device for tensor in (*module.parameters(), *module.buffers())}
    with (
        randomness_kept(devices),
        exact(),
        torch.compiler.set_stance("force_eager"),
        state_kept(module, mode.saved) as mode.before_write,
        recomputation_refused(),
    ):
        yield forward


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach().clone()
    # An integer input is left as it is: Captum's own error says what is wrong with it.
    return leaf.requires_grad_() if leaf.is_floating_point() or leaf.is_complex() else leaf


def _ordinary(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _moved(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, Tensor) else leaf


def _refuse_scripted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedOp(
                f"{name or 'the model'} is a scripted or traced module ({type(module).__name__}), "
                f"whose rectifiers cannot be seen; give the Python module that it was made from"
            )


__all__ = ["Deconvolution", "NeuronDeconvolution"]

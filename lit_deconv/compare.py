"""Side by side with Captum: its attributions run so that nothing notices, and how far two agree."""

from __future__ import annotations

import difflib
import inspect
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import captum.attr  # type: ignore[import-untyped]
import numpy as np
import torch
from captum.attr import Attribution, LayerAttribution, NeuronAttribution
from torch import Tensor, nn

from lit_deconv.engine.undisturbed import undisturbed

Selector = int | tuple[int | slice, ...] | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How far two attributions of one image agree.

    Args:
        cosine: Cosine of all values, sign and input channels included; 1 where they differ by a
            positive factor only.
        rank: Spearman's rank correlation of the pixels' importance: |values| summed over the input
            channels, as in Adebayo et al. 2018, section 3 (ABS).
        why: Why a number is NaN; empty where both are numbers.
    """

    cosine: float
    rank: float
    why: str = ""

    def __str__(self) -> str:
        """What stands below a picture."""
        numbers = {"cosine": self.cosine, "rank": self.rank}
        parts = [f"{name} {value:.2f}" for name, value in numbers.items() if math.isfinite(value)]
        return ", ".join([*parts, self.why] if self.why else parts)


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """Compares two attributions of one image; never raises for what the values are.

    Cut both to the unit's receptive field before: the zeros outside are no agreement.

    Args:
        first: [C, h, w].
        second: [C, h, w].

    Returns:
        The agreement, NaN with a reason where it is not defined.

    Raises:
        ValueError: When the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 3:
        raise ValueError(
            f"expected two attributions [C, h, w] of one shape, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    a, b = (each.detach().to("cpu", torch.float64) for each in (first, second))
    if not (a.isfinite().all() and b.isfinite().all()):
        return Agreement(math.nan, math.nan, "values not finite")
    if not a.any() or not b.any():
        which = "both are zero" if not a.any() and not b.any() else "one is zero everywhere"
        return Agreement(math.nan, math.nan, which)
    cosine = _cosine(a.flatten(), b.flatten())
    ranks = [_mean_ranks(each.abs().sum(0).flatten()) for each in (a, b)]
    centred = [each - each.mean() for each in ranks]
    if not centred[0].any() or not centred[1].any():
        return Agreement(cosine, math.nan, "no rank: all pixels alike")
    return Agreement(cosine, _cosine(*centred))


def agreements(first: Tensor, second: Tensor) -> list[Agreement]:
    """`agreement` for each image of two batches [N, C, h, w]."""
    return [agreement(a, b) for a, b in zip(first, second, strict=True)]


def captum_deconvolution(
    model: nn.Module, inputs: Tensor, target: int | Sequence[int] | Tensor | None
) -> Tensor:
    """Captum's `Deconvolution` of a class, run safely.

    Args:
        model: Returns logits [N, classes].
        inputs: [N, C, H, W].
        target: One class for all images, or one each.

    Returns:
        Like `inputs`.
    """
    return captum_attribution("Deconvolution", model, inputs, target=target)


def captum_neuron(
    model: nn.Module, layer: nn.Module | str, inputs: Tensor, selector: Selector
) -> Tensor:
    """Captum's `NeuronDeconvolution` of a unit, run safely.

    Its seed is 1, not the activation: times a positive activation it is what ours gives.

    Args:
        model: The model.
        layer: Module or its dotted name.
        inputs: [N, C, H, W].
        selector: Captum's; `unit_selector` makes one for a different unit in each image.

    Returns:
        Like `inputs`.
    """
    return captum_attribution("NeuronDeconvolution", model, inputs, layer=layer, selector=selector)


def unit_selector(positions: Tensor) -> Callable[[Tensor], Tensor]:
    """A selector for one unit in each image: Captum's fastest form for many units.

    Args:
        positions: int64 [N, 3]: channel, row, column for each image of the batch.
    """

    def select(output: Tensor) -> Tensor:
        channel, row, column = positions.to(output.device).T
        return output[torch.arange(len(positions), device=output.device), channel, row, column]

    return select


def captum_attribution(
    name: str,
    model: nn.Module,
    inputs: Tensor,
    *,
    target: int | Sequence[int] | Tensor | None = None,
    layer: nn.Module | str | None = None,
    selector: Selector | None = None,
    **options: Any,
) -> Tensor:
    """Any of Captum's attributions to the input, by its class name, run so that nothing notices.

    Args:
        name: Such as "Saliency", "IntegratedGradients", "GuidedGradCam" or "NeuronGradient".
        model: The model; compiled or not, in any mode.
        inputs: [N, C, H, W].
        target: The class, for those that attribute the model's output.
        layer: Module or dotted name, for those that need one.
        selector: The unit, for the neuron forms.
        options: Handed on to the class or its `attribute`, whichever knows them, such as
            `n_steps=20`, `baselines=...` or `additional_forward_args=...`.

    Returns:
        Like `inputs`.

    Raises:
        ValueError: When the name is none of Captum's attributions to the input, or an argument
            that it needs is missing or unknown to it.
    """
    cls = attribution_class(name)
    neuron = issubclass(cls, NeuronAttribution)
    made: dict[str, Any] = {}
    asked: dict[str, Any] = {}
    constructor = inspect.signature(cls.__init__).parameters
    method = inspect.signature(cls.attribute).parameters
    if "layer" in constructor:
        if layer is None:
            raise ValueError(f"{name} needs layer=, a module or its dotted name")
        made["layer"] = model.get_submodule(layer) if isinstance(layer, str) else layer
    if neuron:
        if selector is None:
            raise ValueError(f"{name} needs selector=, the unit to attribute")
        asked["neuron_selector"] = selector
    if "target" in method:
        asked["target"] = target
    for option, value in options.items():
        if option in method:
            asked[option] = _fresh(value)
        elif option in constructor:
            made[option] = value
        else:
            known = sorted({*constructor, *method} - {"self", "inputs", "model", "forward_func"})
            raise ValueError(f"{name} has no option {option!r}; it knows {', '.join(known)}")
    with unnoticed(model):
        attributed = cls(model, **made).attribute(_fresh(inputs), **asked)
    return attributed.detach()


def attribution_class(name: str) -> type[Attribution]:
    """Captum's class of that name, if it attributes to the input.

    Raises:
        ValueError: With the nearest names, where there is no such class.
    """
    known = attribution_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose among {', '.join(known)}"
        raise ValueError(f"Captum has no attribution to the input named {name!r}; {hint}")
    return getattr(captum.attr, name)


def attribution_names() -> list[str]:
    """Names of Captum's classes that attribute a model's output or a unit to the input image."""
    names = []
    for name in captum.attr.__all__:
        cls = getattr(captum.attr, name)
        if not inspect.isclass(cls) or not issubclass(cls, Attribution):
            continue
        first = list(inspect.signature(cls.__init__).parameters)[1:2]
        is_base = cls.__module__ == Attribution.__module__
        if first in (["model"], ["forward_func"]) and not is_base and not _is_layer_only(cls):
            names.append(name)
    return sorted(names)


@contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """Runs foreign code on a model in eval mode and leaves no trace, also after an exception.

    What `undisturbed` keeps, and what foreign code may move besides: hooks and attributes that
    appeared are removed, gradients and the random numbers of Python and numpy are as before, and
    gradients work inside `no_grad` and `inference_mode`.

    Args:
        model: What will be run.
    """
    modules = list(model.modules())
    hooks = [{name: set(getattr(module, name)) for name in _HOOKS} for module in modules]
    attributes = [set(vars(module)) for module in modules]
    full = [module._is_full_backward_hook for module in modules]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        for parameter, _ in gradients:
            # set aside, so that not even a backward pass could add to it
            parameter.grad = None
        with undisturbed(model), torch.enable_grad(), warnings.catch_warnings():
            # said on every call, and no longer true once we are done
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for module, tables, names in zip(modules, hooks, attributes, strict=True):
            for name in _HOOKS:
                table = getattr(module, name)
                for key in set(table) - tables[name]:
                    del table[key]
            for name in set(vars(module)) - names:
                del module.__dict__[name]
        for module, is_full in zip(modules, full, strict=True):
            module._is_full_backward_hook = is_full
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(python)
        np.random.set_state(numpy)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_NOISE = (
    ".*hooks on ReLU activations",
    ".*hooks and attributes on non-linear",
    ".*required_grads has been set automatically",
)


def _is_layer_only(cls: type) -> bool:
    """Whether a class attributes to a layer: GuidedGradCam needs one, yet attributes to inputs."""
    return issubclass(cls, LayerAttribution) or cls.__name__.startswith("Layer")


def _fresh(value: Any) -> Any:
    """A copy of a tensor that autograd may use: no inference tensor, no part of another graph."""
    if isinstance(value, (tuple, list)):
        return type(value)(_fresh(each) for each in value)
    if not isinstance(value, Tensor):
        return value
    with torch.inference_mode(False):
        return value.detach().clone()


def _cosine(a: Tensor, b: Tensor) -> float:
    # scaled first: squares of very large or small values leave the range
    a, b = a / a.abs().max(), b / b.abs().max()
    return float(torch.dot(a, b) / (a.norm() * b.norm()))


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks, equal values sharing the mean of theirs.

    Not torchmetrics' own: it adds ranks in int32, which overflows where many pixels are zero.
    """
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).to(values.dtype)
    return (last - (counts - 1) / 2)[group]

"""Torchvision's models with random weights that let activations through, and three layers of each."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_deconv.layers import Observation, automatic, kind_of, named_layers

# What a model needs to accept a small image, or to be built without a wait; and its image size.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "aux_logits": False},
    "inception_v3": {"init_weights": False, "aux_logits": False},
    "vit_h_14": {"image_size": 56},
    "vit_*": {"image_size": 64},
}
_SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56, "alexnet": 96, "squeezenet*": 96}
# Two images up to this number of weights, beyond it one: time and memory.
_TWO_IMAGES_UP_TO = 100_000_000


def names_of_models() -> list[str]:
    """The classification models of torchvision, then the segmentation models."""
    modules = (torchvision.models, torchvision.models.segmentation)
    return [name for module in modules for name in torchvision.models.list_models(module=module)]


def build(name: str) -> nn.Module:
    """A model of torchvision with random weights, in eval mode.

    Args:
        name: As ``torchvision.models.get_model`` takes it.
    """
    options = _by_glob(_OPTIONS, name, {})
    builder = torchvision.models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:
        options = {**options, "weights_backbone": None}
    with Uninitialised():
        model = torchvision.models.get_model(name, weights=None, **options)
    draw_weights(model)
    return model.eval()


def images_for(name: str, model: nn.Module) -> Tensor:
    """Images of noise at the smallest size that the model works at, [N, 3, H, W]."""
    size = _by_glob(_SIZES, name, 64)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return torch.randn(2 if weights <= _TWO_IMAGES_UP_TO else 1, 3, size, size)


class Uninitialised(TorchFunctionMode):
    """Leaves weights as allocated: they are drawn afterwards, once."""

    _DRAWS = frozenset({"normal_", "uniform_", "trunc_normal_", "erfinv_", "clamp_"})

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self._DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if isinstance(drawn, nn.Parameter):
                return drawn
        return func(*args, **kwargs)


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Draws all weights so that activations neither vanish nor are all alike (scale by fan-in)."""
    for module in model.modules():
        is_norm = "Norm" in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if is_norm and name == "weight":
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim > 1 and name.endswith("weight"):
                fan_in = parameter[0].numel()
                parameter.normal_(0, (2 / fan_in) ** 0.5)
            elif name == "layer_scale":
                parameter.uniform_(0.2, 0.6)  # ConvNeXt starts at 1e-6: no block would be seen
            else:
                parameter.normal_(0, 0.1)


@contextmanager
def calibrated(model: nn.Module) -> Iterator[None]:
    """While it is on, each batch norm takes its statistics from what it is given, and keeps them.

    Without it, random weights make the activations of deep networks grow or vanish.
    """

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        rows = x.transpose(0, 1).flatten(1)
        centred = rows - rows.mean(1, keepdim=True)
        mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
        mean.copy_(rows.mean(1))
        # A map of one pixel has no variance of its own; a tenth of all channels' keeps it from 0.
        variance.copy_(centred.square().mean(1) + 0.1 * rows.var(correction=0) + 1e-6)

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(take) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def prepared(name: str, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """A model of torchvision, calibrated, with its images, both drawn on the CPU."""
    torch.manual_seed(0)
    model = build(name)
    images = images_for(name, model).to(device)
    model.to(device)
    with calibrated(model), torch.no_grad():
        model(images)
    return model, images


def _by_glob(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for glob, value in table.items() if fnmatch.fnmatch(name, glob)), default)


# ---- which layers -----------------------------------------------------------------------------


def choose(model: nn.Module, images: Tensor) -> list[str]:
    """An early, a middle and a late layer: those of the automatic choice, else evenly spaced ones.

    Args:
        model: The model.
        images: [N, C, *map], for one forward pass.
    """
    seen = observe(model, images)
    names = automatic(seen, limit=3)
    if len(names) == 3:
        return names
    once = [
        o.name
        for o in seen
        if o.calls == 1 and o.kind in ("activation", "conv") and len(o.shape) > 2
    ]
    if len(once) <= 3:
        return once
    return [once[0], once[len(once) // 2], once[-1]]


@torch.no_grad()
def observe(model: nn.Module, images: Tensor) -> list[Observation]:
    """Runs a model once and notes what each module returned, in the order in which they did."""
    found: dict[str, Observation] = {}

    def note(name: str, module: nn.Module, output: Any) -> None:
        calls = found.pop(name).calls + 1 if name in found else 1
        shape = tuple(output.shape) if isinstance(output, Tensor) else ()
        found[name] = Observation(name, kind_of(module), shape, calls)

    hooks = [
        module.register_forward_hook(lambda m, args, output, n=name: note(n, m, output))
        for name, module in named_layers(model).items()
    ]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())

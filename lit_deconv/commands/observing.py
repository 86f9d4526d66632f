"""One forward pass watched: which modules ran, what they returned, which layers the choice falls on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_deconv.engine.undisturbed import undisturbed
from lit_deconv.layers import Observation, automatic, kind_of, named_layers, resolve


def observe(model: nn.Module, images: Tensor) -> list[Observation]:
    """Watch the modules of a model run.

    Args:
        model: Takes the images.
        images: [N, C, H, W].

    Returns:
        One entry per module that ran, in the order in which they (last) returned.
    """
    seen: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            calls = seen.pop(name)[2] if name in seen else 0
            seen[name] = (module, shape, calls + 1)

        return see

    modules: dict[nn.Module, str] = {}
    for name, module in named_layers(model).items():
        modules.setdefault(module, name)
    placed = [module.register_forward_hook(hook(name)) for module, name in modules.items()]
    try:
        with undisturbed(model), torch.no_grad():
            model(images)
    finally:
        for handle in placed:
            handle.remove()
    return [Observation(n, kind_of(m), shape, calls) for n, (m, shape, calls) in seen.items()]


def chosen_layers(model: nn.Module, images: Tensor, wanted: str, limit: int = 5) -> list[str]:
    """Names of the layers that a user asked for.

    Args:
        model: The model.
        images: [N, C, H, W], for the automatic choice.
        wanted: "auto", or names and globs separated by commas; of what a glob matches, modules without
            feature maps are left out.
        limit: The automatic choice takes at most so many.

    Raises:
        ValueError: An unknown name, or nothing that could be chosen.
    """
    if wanted != "auto":
        entries = [name.strip() for name in wanted.split(",") if name.strip()]
        return _named(model, images, entries)
    names = automatic(observe(model, images), limit)
    if not names:
        raise ValueError(
            "no layer could be chosen: no convolution or activation gave a feature map [N, C, H, W]; "
            "name layers with --layers (`lit-deconv layers` lists them)"
        )
    return names


def _named(model: nn.Module, images: Tensor, entries: list[str]) -> list[str]:
    """Layers by name as they are; of those a glob matches, the ones with feature maps."""
    known = named_layers(model)
    if all(entry in known for entry in entries):
        return entries
    observations = {o.name: o for o in observe(model, images)}
    found: dict[str, None] = {}
    for entry in entries:
        names = list(resolve(model, entry))
        if entry not in known:
            drawn = [n for n in names if n in observations and _has_maps(observations[n])]
            if not drawn:
                raise ValueError(
                    f"none of the layers that match {entry!r} gives feature maps [N, C, H, W] once in "
                    f"a forward pass: {', '.join(names[:5])}; `lit-deconv layers` lists those that do"
                )
            names = drawn
        found.update(dict.fromkeys(names))
    return list(found)


def _has_maps(seen: Observation) -> bool:
    return seen.calls == 1 and len(seen.shape) == 4

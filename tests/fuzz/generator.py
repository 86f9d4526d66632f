"""A random network from one seed, in both forms, with its parameters and inputs."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations, channels, convolutions, gates, maps, reference, sums, topologies
from .constructs import CONSTRUCTS
from .convolutions import convolve
from .writer import Storage, Variable, Writer

ROOMS = (convolutions, activations, topologies, maps, channels, sums, gates)
"""Importing them fills the registry."""

Reference = Callable[[Tensor, dict[str, Tensor], dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Network:
    """Both forms as source, and what is asked of them.

    Args:
        seed: what it was made from.
        source: the user's form, a class ``Net``.
        reference: the same by definition, a function of input, parameters and an empty dict that
            it fills with each layer's output.
        layers: names to choose from: modules that are called once, in order; the first is the
            chosen one.
        repeated: modules that are called more than once, and how often.
        gates: what ``Deconvnet`` is told about gates.
        input_shape: samples, channels and extents.
        constructs: what occurs in it.
        captum_right: whether Captum's deconvolution is right on the chosen layer.
        trainable: whether no op overwrites what autograd has saved.
        train_mode: whether the model is handed over in train mode.
    """

    seed: int
    source: str
    reference: str
    layers: tuple[str, ...]
    repeated: tuple[tuple[str, int], ...]
    gates: Literal["constant", "gradient"]
    input_shape: tuple[int, ...]
    constructs: frozenset[str]
    captum_right: bool
    trainable: bool
    train_mode: bool

    @property
    def layer(self) -> str:
        return self.layers[0]

    def model(self) -> nn.Module:
        """The user's form with its parameters, in float64."""
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        exec(self.source, scope)
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = scope["Net"]().double()
        _fill(model, self.seed)
        return model.train(self.train_mode)

    def reference_function(self) -> Reference:
        """The reference as a function."""
        scope: dict[str, Any] = {"torch": torch, "F": F}
        scope |= {"rectify": reference.rectify, "unchanged": reference.unchanged}
        scope |= reference.CONSTANT if self.gates == "constant" else reference.GRADIENT
        exec(self.reference, scope)
        function: Reference = scope["reference"]
        return function

    def inputs(self) -> Tensor:
        """The images [N, C, *map], float64."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.input_shape, generator=generator, dtype=torch.float64)

    def __str__(self) -> str:
        return (
            f"# seed {self.seed}, layer {self.layer}, gates {self.gates}, inputs {self.input_shape}, "
            f"train mode {self.train_mode}, trainable {self.trainable}\n{self.source}\n\n{self.reference}\n"
        )


def _fill(model: nn.Module, seed: int) -> None:
    """Draws every parameter and statistic from the seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.endswith("running_var"):
                noise = noise.abs() + 0.5
            elif tensor.ndim == 1:
                noise = 0.4 * noise + (0.6 if name.endswith("weight") else 0.0)
            else:
                noise *= 1.4 * (tensor.shape[0] / tensor.numel()) ** 0.5
            tensor.copy_(noise)


def generate(seed: int) -> Network:
    """The network of a seed."""
    rng = random.Random(seed)
    plain = rng.random() < 0.3
    writer = Writer(rng, plain=plain, trainable=rng.random() < 0.97)
    n, c = rng.randint(1, 3), rng.choice((1, 3, 3, 4))
    gates: Literal["constant", "gradient"] = "gradient" if rng.random() < 0.1 else "constant"
    dimensions = rng.choices((1, 2, 3), (6, 88, 6))[0]
    smallest, largest = {1: (20, 32), 2: (12, 18), 3: (6, 8)}[dimensions]
    extents = tuple(rng.randint(smallest, largest) for _ in range(dimensions))
    images = Variable("x", Storage("x", (c, *extents), frozen=True), 0, c)
    writer.add(convolve(writer, images))
    if rng.random() < 0.3:
        writer.add(images)
    names = [
        name
        for name, (_, _, right, anywhere) in sorted(CONSTRUCTS.items())
        if (right or not plain) and (anywhere or dimensions == 2)
    ]
    weights = [CONSTRUCTS[name][0] for name in names]
    for _ in range(rng.randint(4, 11)):
        name = rng.choices(names, weights)[0]
        before = len(writer.constructs)
        if CONSTRUCTS[name][1](writer) is not None or len(writer.constructs) > before:
            writer.constructs.add(name)
    if not writer.layers():
        CONSTRUCTS["identity"][1](writer)
    final = writer.variables[-1]
    output = _head(writer, final)

    layers = writer.layers()
    chosen = layers[max(rng.randrange(len(layers)) for _ in range(3))]
    others = [name for name in layers if name != chosen]
    rng.shuffle(others)
    captum_right = plain and not writer.taps[chosen].overwritten
    return Network(
        seed,
        _user_source(writer, output[0]),
        _reference_source(writer, output[1]),
        (chosen, *others),
        tuple(writer.repeated()),
        gates,
        (n, c, *extents),
        frozenset(writer.constructs),
        captum_right,
        writer.trainable,
        rng.random() < 0.5,
    )


def _head(w: Writer, x: Variable) -> tuple[str, str]:
    """What the network returns: a map, or scores of a linear layer."""
    user, value = w.read(x)
    if w.rng.random() < 0.4:
        return user, value
    w.constructs.add("linear head")
    name = w.module(f"nn.Linear({x.channels}, 4)", "linear")
    pooled = f"{{x}}.mean({tuple(range(2, len(x.shape) + 1))}).flatten(1)"
    if len(x.shape) == 3 and w.rng.random() < 0.3:
        pooled = "torch.flatten(F.adaptive_avg_pool2d({x}, 1), 1)"
    return (
        f"self.{name}({pooled.format(x=user)})",
        f'F.linear({pooled.format(x=value)}, p["{name}.weight"], p["{name}.bias"])',
    )


def _user_source(w: Writer, output: str) -> str:
    lines = ["class Net(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        {line}" for line in w.init]
    lines += ["", "    def forward(self, x):"]
    lines += [f"        {line}" for line in w.forward]
    return "\n".join([*lines, f"        return {output}"])


def _reference_source(w: Writer, output: str) -> str:
    lines = ["def reference(x, p, taps):"] + [f"    {line}" for line in w.reference]
    return "\n".join([*lines, f"    return {output}"])

"""What a user would write with Captum: the top units of some channels, reconstructed, drawn and kept.

    python -m benchmarks._captum_script WEIGHTS FOLDER OUTPUT LAYERS CHANNELS K BATCH

It finds the strongest units by forward hooks, asks NeuronDeconvolution for BATCH units a call (1: one
by one; each unit in a batch with its own copy of its image), multiplies by the activation, and writes
one npz and one PNG grid a layer. No captions, no contrast but one scale a picture, no log.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captum.attr import NeuronDeconvolution  # type: ignore[import-untyped]
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.utils import save_image

warnings.filterwarnings("ignore")


def selector(units: Tensor) -> Callable[[Tensor], Tensor]:
    rows = torch.arange(len(units))
    return lambda output: output[rows, units[:, 1], units[:, 2], units[:, 3]]


def strongest(output: Tensor, channels: list[int], k: int) -> tuple[Tensor, Tensor]:
    """Units [U, 4] and their activations: per channel the k largest, one an image."""
    width = output.shape[3]
    best, place = output[:, channels].flatten(2).max(2)  # [N, channels]
    values, samples = best.topk(k, 0)
    place = place.gather(0, samples)
    channel = torch.tensor(channels).expand_as(samples)
    units = torch.stack([samples, channel, place // width, place % width], 2)
    return units.transpose(0, 1).flatten(0, 1), values.T.flatten()


def main() -> None:
    weights, folder, output, layers, count, k, size = sys.argv[1:]
    model = models.alexnet()
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    prepare = models.AlexNet_Weights.DEFAULT.transforms()
    images = torch.stack([prepare(Image.open(path)) for path in sorted(Path(folder).iterdir())])
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], found: Tensor) -> None:
            outputs[name] = found.detach().clone()

        return hook

    hooks = [model.get_submodule(n).register_forward_hook(keep(n)) for n in layers.split(",")]
    with torch.no_grad():
        for part in images.split(16):
            before = dict(outputs)
            model(part)
            outputs = {
                n: torch.cat([before[n], o]) if n in before else o for n, o in outputs.items()
            }
    for hook in hooks:
        hook.remove()
    Path(output).mkdir(parents=True)
    for name, activations in outputs.items():
        total = activations.shape[1]
        channels = [index * total // int(count) for index in range(int(count))]
        units, values = strongest(activations, channels, int(k))
        captum = NeuronDeconvolution(model, model.get_submodule(name))
        found = []
        for some in units.split(int(size)):
            found.append(captum.attribute(images[some[:, 0]].clone(), selector(some)).detach())
        pictures = torch.cat(found) * values.view(-1, 1, 1, 1)
        np.savez(f"{output}/{name}.npz", reconstructions=pictures.numpy(), units=units.numpy())
        scale = pictures.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)
        shown = torch.stack([0.5 + pictures / scale / 2, images[units[:, 0]]], 1).flatten(0, 1)
        save_image(shown, f"{output}/{name}.png", nrow=2 * int(k))


if __name__ == "__main__":
    main()

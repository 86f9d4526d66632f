"""Every model of torchvision, walked back by rules and by autograd, and by Captum beside them.

    python benchmarks/zoo.py [--models GLOB ...] [--double] [--device cuda] [--markdown docs/zoo.md]

For an early, a middle and a late layer of each model: the path that is taken, the ops without a
rule, the largest error of one walk against the other on the same forward, whether Captum agrees,
and whether `explain()` had said so.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import itertools
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

if not __package__:  # run as a file
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks._zoo_models import choose, names_of_models, prepared
from benchmarks._zoo_table import HEAD, Row, Zoo, cells, markdown
from lit_deconv import Deconvnet
from lit_deconv.attr import Path
from lit_deconv.compare import captum_attribution
from lit_deconv.engine import DeconvError
from lit_deconv.explain import Explanation


def check(
    name: str, model: nn.Module, images: Tensor, *, double: bool = False, seed: int = 0
) -> list[Row]:
    """Compares the walks at an early, a middle and a late layer of a model.

    Args:
        name: The model's name, for the rows.
        model: In float32; with ``double`` it is in float64 afterwards.
        images: [N, C, *map].
        double: Compare in float64 too.
        seed: For the choice of units.

    Returns:
        One row a layer.
    """
    layers = choose(model, images)
    explanations, refused = explain(model, layers, images)
    reached = list(explanations)
    maps = Deconvnet(model, reached).activations(images)
    units = {
        layer: strongest_units(activation, torch.Generator().manual_seed(seed))
        for layer, activation in maps.items()
    }
    by_rules = [layer for layer, found in explanations.items() if found.path == "rules"]
    walked = walks(model, by_rules, images, units)
    errors = {False: {layer: both[0] for layer, both in walked.items()}}
    ours = {layer: both[1] for layer, both in walked.items()}
    rest = [layer for layer in reached if layer not in by_rules]
    for layer in rest:
        try:
            ours[layer] = Deconvnet(model, layer).reconstruct(images, units[layer])
        except DeconvError as error:
            refused[layer] = f"{type(error).__name__}: {error}"
        else:
            if not bool(ours[layer].isfinite().all() & ours[layer].any()):
                refused[layer] = "the reconstruction is zero or not finite"
    captum = {
        layer: captum_error(model, layer, images, units[layer], maps[layer], ours[layer])
        for layer in ours
    }
    if double:
        again = walks(model.double(), by_rules, images.double(), units)
        errors[True] = {layer: both[0] for layer, both in again.items()}
    rows = {layer: Row(name, layer, (), "refused", why=why) for layer, why in refused.items()}
    for layer, found in explanations.items():
        single, twice = errors[False].get(layer), errors.get(True, {}).get(layer)
        rows[layer] = Row(
            name,
            layer,
            tuple(maps[layer].shape),
            "refused" if layer in refused else found.path,
            missing=missing_ops(found),
            refused=refused_ops(found),
            why=refused.get(layer) or next(iter(found.reasons), ""),
            layer_error=single[0] if single else None,
            unit_error=single[1] if single else None,
            layer_error_double=twice[0] if twice else None,
            unit_error_double=twice[1] if twice else None,
            captum=captum.get(layer),
            faults=found.captum_faults,
        )
    return [rows[layer] for layer in layers]


def strongest_units(activation: Tensor, generator: torch.Generator, count: int = 2) -> Tensor:
    """The strongest unit of some channels in each image, channels drawn among those that fire.

    Args:
        activation: [N, C, *map].
        generator: Draws the channels.
        count: Channels per image.

    Returns:
        int64 [count * N, 2 + D], the images one after the other, then again.
    """
    activation = activation.cpu()
    flat = activation.flatten(2) if activation.ndim > 2 else activation.unsqueeze(2)
    strongest, position = flat.max(2)
    units = []
    for _, image in itertools.product(range(count), range(len(flat))):
        firing = (strongest[image] > 0).nonzero().flatten()
        pool = firing if len(firing) else torch.arange(flat.shape[1])
        channel = pool[torch.randint(len(pool), (), generator=generator)]
        place = torch.unravel_index(position[image, channel], activation.shape[2:])
        units.append(torch.stack([torch.tensor(image), channel, *place]))
    return torch.stack(units)


def explain(
    model: nn.Module, layers: Sequence[str], images: Tensor
) -> tuple[dict[str, Explanation], dict[str, str]]:
    """What the engine says of each layer, and why it refuses to say anything of the others."""
    explanations: dict[str, Explanation] = {}
    refused: dict[str, str] = {}
    try:
        explanations.update(Deconvnet(model, list(layers)).explain(images))
    except DeconvError:
        for layer in layers:
            try:
                explanations[layer] = Deconvnet(model, layer).explain(images)
            except DeconvError as error:
                refused[layer] = f"{type(error).__name__}: {error}"
    return explanations, refused


def walks(
    model: nn.Module, layers: Sequence[str], images: Tensor, units: dict[str, Tensor]
) -> dict[str, tuple[tuple[float, float], Tensor]]:
    """Largest relative error of the rules' walk against the autograd walk, by layer.

    Args:
        model: The model.
        layers: Names of layers that both can walk from.
        images: [N, C, *map].
        units: By layer, int64 [U, 2 + D].

    Returns:
        The errors over the whole layer and over single units, and the units by rules.
    """
    if not layers:
        return {}
    paths: tuple[Path, ...] = ("rules", "autograd")
    nets = [Deconvnet(model, list(layers), path=path) for path in paths]
    wholes = [net.attribute(images) for net in nets]
    singles = [net.reconstruct(images, {name: units[name] for name in layers}) for net in nets]
    found = {}
    for layer in layers:
        whole = relative_error(wholes[0][layer], wholes[1][layer])
        single = relative_error(singles[0][layer], singles[1][layer])
        found[layer] = (whole, single), singles[0][layer]
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference in any row, over that row's largest value; NaN stays NaN.

    Args:
        found: [U, ...].
        expected: The same shape; a row of zeros must be met by zeros.
    """
    difference = (found - expected).flatten(1).abs().amax(1)
    size = expected.flatten(1).abs().amax(1)
    return float(torch.where(difference == 0, difference, difference / size).max())


def captum_error(
    model: nn.Module, layer: str, images: Tensor, units: Tensor, activation: Tensor, ours: Tensor
) -> float:
    """Captum's NeuronDeconvolution of one unit in each image, times its activation, against ours.

    Args:
        model: The model.
        layer: The layer's name.
        images: [N, C, *map].
        units: int64 [U, 2 + D], the first N of them one in each image.
        activation: The layer's output.
        ours: [U, C, *map], the reconstructions of the units.

    Returns:
        The relative error, NaN where Captum raises.
    """
    index = units[: len(images)].unbind(1)
    try:
        theirs = captum_attribution(
            "NeuronDeconvolution", model, images, layer=layer, selector=lambda output: output[index]
        )
    except Exception:  # whatever Captum or autograd under it says, it is no answer
        return float("nan")
    scale = activation[index].view(-1, *[1] * (images.ndim - 1))
    return relative_error(theirs * scale, ours[: len(images)])


def missing_ops(explanation: Explanation) -> tuple[str, ...]:
    """The ops on the way that have no rule, such as ``bmm (2)``."""
    return _counted(reason.split()[0] for reason in explanation.reasons if _NO_RULE in reason)


def refused_ops(explanation: Explanation) -> tuple[str, ...]:
    """The ops on the way that have a rule, which cannot take them here."""
    return _counted(reason.split()[0] for reason in explanation.reasons if _NO_RULE not in reason)


_NO_RULE = "has no reverse rule"


def _counted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name} ({count})" for name, count in Counter(names).items())


def _print(line: Iterable[str]) -> None:
    widths = (29, 34, 19, 9, 12, 8, 9, 9, 9, 9, 15, 0)
    tqdm.write(
        " ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip(),
        file=sys.stdout,
    )
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 0 where nothing fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB", help="which models")
    parser.add_argument("--double", action="store_true", help="compare in float64 too")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--markdown", type=pathlib.Path, metavar="FILE", help="write the table there"
    )
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # What Captum and the search for strongest units compute outside lit-deconv is to be exact too.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    zoo = Zoo()
    _print(HEAD)
    names = [n for n in names_of_models() if any(fnmatch.fnmatch(n, g) for g in asked.models)]
    started = time.perf_counter()
    with tqdm(names, unit="model", file=sys.stderr) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            model, images = prepared(name, asked.device)
            rows = check(name, model, images, double=asked.double)
            del model, images
            gc.collect()
            zoo.rows += rows
            for row in rows:
                _print(cells(row))
    print(*zoo.totals(), f"seconds {time.perf_counter() - started:.0f}", sep="\n")
    print(*(f"FAILS {line}" for line in zoo.failures()), sep="\n")
    if asked.markdown:
        command = "python benchmarks/zoo.py"
        command += "" if asked.models == ["*"] else f" --models {' '.join(asked.models)}"
        command += " --double" if asked.double else ""
        command += "" if asked.device == "cpu" else f" --device {asked.device}"
        on = "CPU" if asked.device == "cpu" else torch.cuda.get_device_name(asked.device)
        # Of an absolute path the name alone: the page is to hold none of this machine.
        file = asked.markdown.name if asked.markdown.is_absolute() else asked.markdown.as_posix()
        asked.markdown.write_text(markdown(zoo, f"{command} --markdown {file}", on))
    return 1 if zoo.failures() else 0


if __name__ == "__main__":
    sys.exit(main())

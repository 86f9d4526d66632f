"""What collecting the strongest units costs a validation, in time and in memory.

    python benchmarks/collector.py [--images 2048] [--channels 16] [--pairs 9] [--stem cifar]

ResNet-18 over generated 32 x 32 images, at its automatic layers: the same pass with and without the
collector's hooks, batch by batch in turn; what of it was spent in the hooks themselves, which is
steadier; and the bytes that are kept after once and ten times the images.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from lit_deconv import Deconvnet
from lit_deconv.layers import Observation, automatic, kind_of, named_layers
from lit_deconv.top import Collector, total_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--channels", type=int, default=16, help="a layer; 0: all")
    parser.add_argument("--stem", choices=("imagenet", "cifar"), default="cifar")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=10)
    if (
        given.stem == "cifar"
    ):  # as ResNets are built for 32 x 32 images: no stride, no pool in front
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    model = model.to(given.device).eval()
    images = torch.randn(given.images, 3, 32, 32, device=given.device)
    layers = automatic(observed(model, images[:1]))
    net = Deconvnet(model, layers)
    layouts = net.layouts(images[:1])
    channels = {
        name: [i * layout.channels // given.channels for i in range(given.channels)]
        for name, layout in layouts.items()
        if given.channels
    }
    collector = Collector(layouts, channels=channels or None, device=given.device)
    print(f"layers: {', '.join(layers)}; {given.channels or 'all'} channels; {given.device}")
    print(f"{given.images} images in batches of {given.batch}, {given.threads} threads")

    # On a CPU the process's own time: others on the machine do not count.
    clock = time.perf_counter if given.device == "cuda" else time.process_time
    inside: list[float] = []

    def noted(hook: Callable[..., None], *arguments: Any) -> None:
        began = clock()
        hook(*arguments)
        inside.append(clock() - began)

    def shown(number: int, batch: Tensor, indices: range | None) -> None:
        if not number:
            collector.reset()
        with hooked(net, partial(noted, collector.see)):
            noted(collector.begin, batch, indices)
            model(batch)
            noted(collector.end)

    def seconds(run: Callable[[int, Tensor], None], number: int) -> float:
        began = clock()
        run(number, batches[number])
        if given.device == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    def collected(number: int, batch: Tensor) -> None:
        first = number * given.batch
        shown(number, batch, range(first, first + len(batch)))

    def hashing(number: int, batch: Tensor) -> None:
        shown(number, batch, None)

    def plain(number: int, batch: Tensor) -> None:
        model(batch)

    batches = list(images.split(given.batch))
    with torch.no_grad():
        for name, other in (("known indices", collected), ("hashed images", hashing)):
            ratios, shares, plains = [], [], []
            gc.disable()
            sides = partial(seconds, plain), partial(seconds, other)
            for before, after in in_turn(*sides, len(batches), 1 + given.pairs):
                ratios.append(after / before)
                shares.append(sum(inside) / before)
                plains.append(before)
                inside.clear()
            gc.enable()
            print(
                f"{name}: {median(ratios[1:])} times the plain pass of "
                f"{statistics.median(plains[1:]):.2f} s; in the hooks {median(shares[1:])} of it"
            )
        estimated = total_bytes(collector.bytes.values())
        few = batches[:2]
        for number, batch in enumerate(few):
            collected(number, batch)
        once = kept(collector)
        for number, batch in enumerate(few * 10):
            collected(number, batch)
        print(
            f"kept bytes: {once} after {sum(map(len, few))} images, {kept(collector)} after ten "
            f"times as many, {estimated} estimated"
        )


def in_turn(
    plain: Callable[[int], float], other: Callable[[int], float], batches: int, pairs: int
) -> Iterator[tuple[float, float]]:
    """Seconds of pairs of passes that take turns batch by batch: both see the machine slow down."""
    for pair in range(pairs):
        before = after = 0.0
        for number in range(batches):
            if (pair + number) % 2:
                before += plain(number)
                after += other(number)
            else:
                after += other(number)
                before += plain(number)
        yield before, after


def median(values: list[float]) -> str:
    """With the interval."""
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def kept(collector: Collector) -> int:
    """Bytes of every tensor that the collector holds."""
    held: dict[int, int] = {}
    for metric in collector.metrics.values():
        states = [getattr(metric, name) for name in metric.start()]
        others = [
            *metric.first,
            *metric.bar,
            metric.chosen,
            metric.patches,
        ]
        for tensor in (*states, *others):
            if isinstance(tensor, Tensor):
                held[id(tensor)] = tensor.nbytes
    return sum(held.values())


@contextmanager
def hooked(net: Deconvnet, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Has every output of a layer seen."""

    def seeing(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, output)

    placed = [module.register_forward_hook(seeing(n)) for n, module in net.layers.items()]
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()


def observed(model: nn.Module, image: Tensor) -> list[Observation]:
    """What each module returned for one image, in the order in which they did."""
    calls: Counter[str] = Counter()
    seen: list[tuple[str, nn.Module, tuple[int, ...]]] = []
    placed = []
    for name, module in named_layers(model).items():

        def note(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            calls[name] += 1
            seen.append((name, module, tuple(getattr(output, "shape", ()))))

        placed.append(module.register_forward_hook(note))
    with torch.no_grad():
        model(image)
    for hook in placed:
        hook.remove()
    return [Observation(n, kind_of(m), shape, calls[n]) for n, m, shape in seen]


if __name__ == "__main__":
    main()

"""What `DeconvCallback` costs a training, at its defaults, and where that goes.

    python benchmarks/overhead.py [--train 512] [--val 512] [--pairs 5] [--folder DIR]

Trains ResNet-18 on 32 x 32 images, with the callback at work in every other epoch, so that epochs with
and without it alternate; the epoch with it ends when its last picture is written. The ratio is given as
measured, and scaled to CIFAR-10's 50,000 and 10,000 images: an epoch without it grows with both, what
the callback adds in its hooks with the validation images, and the rest not at all. The hooks' part is
scaled in proportion, which is too much rather than too little: the first batches bring most of the
strongest units. By the clock alone, as the stages are; CPU time is printed where others use the machine.

Then the same validation with and without it in processes of their own, over as many images and over
ten times as many: what it adds per image, and to the largest memory that the process held.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torchvision
from lightning.pytorch.loggers import TensorBoardLogger
from lit_deconv.callbacks import DeconvCallback
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

TRAIN, VAL = 50_000, 10_000
WARM = 2


class ResNet(pl.LightningModule):
    """ResNet-18 as it is built for 32 x 32 images, or as for 224 x 224."""

    def __init__(self, stem: str) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(weights=None, num_classes=10)
        if stem == "cifar":
            self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.net.maxpool = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Clock(pl.Callback):
    """Notes wall and CPU seconds of each epoch and of its validation, and the callback's stages."""

    def __init__(self, watched: DeconvCallback, device: str) -> None:
        self.watched, self.device = watched, device
        self.epochs: list[tuple[float, float]] = []
        self.validations: list[float] = []
        self.stages: list[dict[str, float]] = []
        self._written = {"render": 0.0, "write": 0.0}

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = self._now()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validations.append(time.perf_counter() - self._validated)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watched.finish_writing()
        wall, cpu = self._now()
        self.epochs.append((wall - self._began[0], cpu - self._began[1]))
        seconds = self.watched.seconds
        for name, before in self._written.items():
            self._written[name] = seconds.get(name, 0.0)
            seconds[name] = self._written[name] - before
        self.stages.append(seconds)


def main() -> None:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=512, help="training images an epoch")
    parser.add_argument("--val", type=int, default=512, help="validation images")
    parser.add_argument("--few", type=int, default=256, help="images of the second comparison")
    parser.add_argument("--times", type=int, default=10, help="more in it; 0 leaves it out")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--pairs", type=int, default=5, help="of warm epochs, with and without")
    parser.add_argument("--stem", choices=("cifar", "imagenet"), default="cifar")
    parser.add_argument("--folder", help="CIFAR-10 as folders train/ and val/ of JPEG files")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    callback = DeconvCallback(every_n_epochs=2, on_error="raise")
    clock = Clock(callback, given.device)
    with tempfile.TemporaryDirectory() as folder:
        pl.Trainer(
            max_epochs=WARM + 2 * given.pairs,
            accelerator="gpu" if given.device == "cuda" else "cpu",
            devices=1,
            logger=TensorBoardLogger(folder),
            callbacks=[callback, clock],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
        ).fit(
            ResNet(given.stem),
            DataLoader(images(given, "train", given.train), given.batch, shuffle=True),
            DataLoader(images(given, "val", given.val), given.batch),
        )
    report(clock, given)
    if given.times:
        report_growth(given)


def validated(count: int, watched: bool, given: argparse.Namespace) -> tuple[float, float, float]:
    """Seconds of a validation, those in the hooks, and the largest memory of this process in MiB."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    callback = DeconvCallback(on_error="raise")
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if given.device == "cuda" else "cpu",
            devices=1,
            logger=TensorBoardLogger(folder),
            callbacks=[callback] if watched else [],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = ResNet(given.stem)
        loader = DataLoader(Drawn(count), given.batch)
        trainer.validate(model, DataLoader(Drawn(given.batch), given.batch), verbose=False)
        began = time.perf_counter()
        trainer.validate(model, loader, verbose=False)
        seconds = time.perf_counter() - began
    return seconds, callback.seconds.get("collect", 0.0), largest_memory()


def largest_memory() -> float:
    """What this process held at most, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # where `getrusage` begins with what the parent held
        (line,) = (each for each in status.read_text().splitlines() if each.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Drawn(Dataset[Any]):
    """Generated images that take no memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)), index % 10


def report_growth(given: argparse.Namespace) -> None:
    """Prints what the callback adds to a validation, and to one over more images."""
    print(
        f"a validation over {given.few} and {given.times} times as many images, as it adds to it:"
    )
    for count in (given.few, given.few * given.times):
        found = []
        for watched in (False, True):
            # a process of its own: the largest memory never falls
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(validated, (count, watched, given)))
        (plain, _, held), (drawn, hooks, more) = found
        print(
            f"  {count:>6} images: {1000 * (drawn - plain) / count:.2f} ms an image, in the hooks "
            f"{1000 * hooks / count:.3f} ms; memory {more - held:.0f} MiB more than {held:.0f}"
        )


def images(given: argparse.Namespace, part: str, count: int) -> Dataset[Any]:
    """Generated images, or those in a folder."""
    if given.folder is None:
        return TensorDataset(torch.randn(count, 3, 32, 32), torch.arange(count) % 10)
    norm = torchvision.transforms.Normalize([0.4914, 0.4822, 0.4465], [0.247, 0.2435, 0.2616])
    read = torchvision.transforms.Compose([torchvision.transforms.ToTensor(), norm])
    found = torchvision.datasets.ImageFolder(Path(given.folder, part), read)
    count = min(count, len(found))
    return Subset(found, [index * len(found) // count for index in range(count)])


def report(clock: Clock, given: argparse.Namespace) -> None:
    """Prints ratios of alternating pairs, and seconds by stage."""
    pairs = range(WARM, WARM + 2 * given.pairs, 2)
    print(
        f"ResNet-18 ({given.stem} stem), {given.train} training and {given.val} validation images, "
        f"batches of {given.batch}, {given.device}, {given.threads} threads, {len(pairs)} pairs"
    )
    validation = statistics.median(clock.validations[i + 1] for i in pairs)
    for kind, name in enumerate(("wall", "CPU")):
        drawn = [clock.epochs[i][kind] for i in pairs]
        plain = [clock.epochs[i + 1][kind] for i in pairs]
        ratios = [a / b for a, b in zip(drawn, plain, strict=True)]
        print(
            f"{name}: an epoch without {statistics.median(plain):.2f} s, with it "
            f"{statistics.median(drawn):.2f} s, ratio {shown(ratios)}"
        )
    wholes, mores = zip(*(scaled(clock, i, given) for i in pairs), strict=True)
    print(
        f"scaled to {TRAIN} + {VAL} images: {statistics.median(wholes):.0f} s + "
        f"{statistics.median(mores):.1f} s, ratio "
        f"{shown([1 + more / whole for whole, more in zip(wholes, mores, strict=True)])}"
    )
    hooks = [1 + clock.stages[i].get("collect", 0.0) / clock.validations[i + 1] for i in pairs]
    print(
        f"validation without {validation:.2f} s; with the collector's hooks {shown(hooks)} times that"
    )
    print("seconds per validation, median (render and write in a thread of their own):")
    for stage in ("collect", "reconstruct", "probe", "captum", "render", "write"):
        values = sorted(clock.stages[i].get(stage, 0.0) for i in pairs)
        print(
            f"  {stage:<12} {statistics.median(values):.3f} ({values[0]:.3f} to {values[-1]:.3f})"
        )


def scaled(clock: Clock, drawn: int, given: argparse.Namespace) -> tuple[float, float]:
    """Seconds of an epoch of CIFAR-10's size, and what the callback would add, from one pair."""
    (with_it, _), (without, _) = clock.epochs[drawn], clock.epochs[drawn + 1]
    validation = clock.validations[drawn + 1]
    collect = clock.stages[drawn].get("collect", 0.0)
    whole = (without - validation) * TRAIN / given.train + validation * VAL / given.val
    return whole, max(0.0, with_it - without - collect) + collect * VAL / given.val


def shown(values: list[float]) -> str:
    """Median and interval."""
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


if __name__ == "__main__":
    main()

"""What `lit-deconv top` does, from its options to the output folder."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from torch import Tensor

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.job import progress
from lit_deconv.commands.looking import KeepWhenStopped, Looking
from lit_deconv.commands.models import chosen_device
from lit_deconv.commands.numbered import Source
from lit_deconv.commands.report import write_report
from lit_deconv.commands.results import INDEX, LOG, prepared_folder
from lit_deconv.commands.top_pages import Pages, Place, places
from lit_deconv.commands.top_plan import Plan, check, planned
from lit_deconv.commands.unfinished import Unfinished, fingerprint, hashed_names
from lit_deconv.commands.winners import Winners
from lit_deconv.render import Look
from lit_deconv.top import TopActivations
from lit_deconv.version import __version__


def top(options: Namespace) -> dict[str, Any] | None:
    """Look, reconstruct, draw and write.

    Args:
        options: Those of `lit-deconv top`.

    Returns:
        The index; None in the processes that help the first.
    """
    check(options)
    device = chosen_device(options.device)
    if device.type == "cuda" and options.devices > torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"--devices {options.devices}: torch finds {found} GPUs here")
    with _quiet():
        trainer = _trainer(device, options.devices)
    plan = planned(options)
    is_first = trainer.global_rank == 0
    if is_first:
        print(plan.cost, file=sys.stderr)
    if options.estimate:
        return {"cost": plan.cost.__dict__} if is_first else None
    folder = Path(options.output)
    unfinished = Unfinished(folder, len(plan.source.names))
    if is_first:
        _prepare(options, plan, unfinished)
    start = time.perf_counter()
    looking = _look(options, plan, trainer, unfinished)
    looking.seconds["looking"] = time.perf_counter() - start
    if not looking.images:
        raise ValueError("none of the images could be read; see the reasons above")
    index = _draw(options, plan, trainer, unfinished, looking, folder)
    return index if is_first else None


def _prepare(options: Namespace, plan: Plan, unfinished: Unfinished) -> None:
    """The output folder: new, or what a stopped run left."""
    if options.force:
        unfinished.end()
    goes_on = unfinished.folder.is_dir()
    folder = prepared_folder(options.output, options.force or goes_on)
    if not goes_on:
        plan.cost.check(folder)
    source = plan.source
    done = unfinished.begin(
        {
            "model": plan.loaded.name,
            "weights": fingerprint(plan.loaded.model),
            "layers and channels": {n: list(chosen) for n, chosen in plan.channels.items()},
            "top-k": options.top_k,
            "raw": options.raw,
            "report": options.report,
            "input": {**source.view.described(), "of": source.about},
            "images": hashed_names(source.names),
        }
    )
    if goes_on:
        print(f"going on: {done} of {len(source.names)} images looked at before", file=sys.stderr)


def _look(options: Namespace, plan: Plan, trainer: Trainer, unfinished: Unfinished) -> Looking:
    looking = Looking(
        plan.net,
        plan.layouts,
        plan.channels,
        options.top_k,
        plan.source,
        unfinished,
        options.batch_size,
        options.workers,
    )
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT) if is_main else None
    try:
        with _quiet():
            trainer.validate(looking, verbose=False)
    except SystemExit as error:  # so Lightning ends a run that is interrupted
        raise KeyboardInterrupt from error
    except torch.OutOfMemoryError as error:
        raise ValueError("out of memory on the GPU; try a smaller --batch-size") from error
    finally:
        if is_main:
            signal.signal(signal.SIGINT, before)
    return looking


def _draw(
    options: Namespace,
    plan: Plan,
    trainer: Trainer,
    unfinished: Unfinished,
    found: Looking,
    folder: Path,
) -> dict[str, Any]:
    """Reconstruct and draw, each process its share of the pages; the first puts all together."""
    assert found.top is not None
    source, strategy, device = plan.source, trainer.strategy, trainer.strategy.root_device
    share = slice(trainer.global_rank, None, trainer.world_size)
    start = time.perf_counter()
    read = _winners(options, source, trainer, unfinished, found.top, plan.example)
    found.seconds["reading the winners"] = time.perf_counter() - start
    look = Look(source.view.mean, source.view.std)
    (unfinished.folder / "seconds.json").write_text(json.dumps(found.seconds))
    finished = unfinished.folder / "pages"
    finished.mkdir(exist_ok=True)
    pages = Pages(
        folder, finished, source.names, look, plan.note, options.raw, options.top_k, options.report
    )
    every = places(plan.channels)
    start = time.perf_counter()
    plan.loaded.model.to(device)
    # a page of each layer, then the next of each: a run that is stopped has something of them all
    mine = sorted(every, key=lambda place: place.number)[share]
    left = [place for place in mine if not pages.is_finished(place)]
    nets = {name: Deconvnet(plan.loaded.model, [name]) for name in plan.layouts}
    try:
        for place in progress(
            iterable=left,
            total=len(mine),
            initial=len(mine) - len(left),
            desc="drawing",
            unit="page",
        ):
            pages.draw(place, nets[place.layer], _held(found.top, place.layer), read, device)
    except KeyboardInterrupt:
        done = sum(map(pages.is_finished, every))
        print(
            f"stopped; {done} of {len(every)} figures are drawn; the same command goes on from there",
            file=sys.stderr,
        )
        raise
    strategy.barrier()
    found.seconds["drawing"] = time.perf_counter() - start
    index = _index(options, plan, found, pages, every)
    if trainer.global_rank == 0:
        pages.log(every)
        if options.report:
            about = {**index, "pictures": range(index["pictures"])}
            cards = [card for place in every for card in pages.cards(place)]
            write_report(folder / "report.html", about, list(plan.layouts), cards)
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        unfinished.end()
    strategy.barrier()
    return index


def _winners(
    options: Namespace,
    source: Source,
    trainer: Trainer,
    unfinished: Unfinished,
    found: TopActivations,
    example: Tensor,
) -> Winners:
    """Read the images that won, each once, each process its share."""
    identities = [layer.identity[layer.exists].cpu() for layer in found.values()]
    numbers = torch.cat(identities).unique()
    winners = Winners(unfinished.folder / "winners.npy", numbers, source.images)
    done = unfinished.folder / "winners-read"
    if not done.exists():
        if trainer.global_rank == 0:
            winners.make(example)
        trainer.strategy.barrier()
        own = numbers[trainer.global_rank :: trainer.world_size]
        loader = source.loader(own, options.batch_size, options.workers)
        with progress(total=len(own), desc="reading the winners", unit="image") as bar:
            for batch in loader:
                for number, why in batch.unreadable.items():
                    raise OSError(f"{source.names[number]} cannot be read any more: {why}")
                winners.write(batch.numbers, batch.values)
                bar.update(len(batch.numbers))
        trainer.strategy.barrier()
        done.touch()
    return winners


def _held(found: TopActivations, name: str) -> Any:
    """A layer's units, as if this process had looked at all of their images."""
    return replace(found[name], held=torch.ones_like(found[name].held))


def _index(
    options: Namespace, plan: Plan, found: Looking, pages: Pages, every: Sequence[Place]
) -> dict[str, Any]:
    layers: dict[str, dict[str, Any]] = {
        name: {**about, "units": 0, "doubtful": 0, "files": []}
        for name, about in plan.about.items()
    }
    for place in every:
        layer = layers[place.layer]
        for key, count in pages.about(place).items():
            layer[key] += count
        layer["files"].append(f"{place.tag}.json")
    names = plan.source.names
    return {
        "lit_deconv": __version__,
        "model": plan.loaded.name,
        "note": plan.note,
        "seed": "strongest",
        "compare": [],
        "input": plan.source.view.described(),
        "of": plan.source.about,
        "pictures": len(names),
        "skipped": {names[number]: why for number, why in sorted(found.unreadable.items())},
        "layers": layers,
        "figures": [{"layer": p.layer, "file": f"{p.tag}.png"} for p in every],
        "log": LOG,
        "seconds": found.seconds,
        "complete": True,
    }


def _trainer(device: torch.device, devices: int) -> Trainer:
    on_gpu = device.type == "cuda"
    which: Any = [device.index or 0] if on_gpu and devices == 1 else devices
    return Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=which,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,
        use_distributed_sampler=False,  # `Looking` shares the images out itself, none of them twice
        callbacks=[KeepWhenStopped()],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines on devices and workers, which are no news here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

"""What each of two processes runs: the same fits, some with a failure in one process or in both.

Not a test: `test_processes` starts it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_models import (
    Breaking,
    LitNet,
    hooks_on,
    images_and_labels,
    random_states,
    recorded,
    seeded,
    tiny_net,
    trainer,
)
from lit_deconv.callbacks import DeconvCallback, capture, gallery, session, strongest
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

STAGES: dict[str, tuple[Any, str]] = {
    "begin": (session.Watch, "begin"),
    "hook": (capture.Capture, "_enter"),
    "ranking": (strongest.Collector, "see"),
    "share": (strongest.Collection, "share"),
    "merge": (strongest.Collection, "merge"),
    "reconstruct": (strongest, "reconstruct_top"),
    "render": (gallery, "figure2"),
    "write": (gallery.Writer, "image"),
}
FIRST_ALONE = ("render", "write")
"""What the first process does alone."""
FAULTS: dict[str, tuple[str, list[int]]] = {
    f"{stage} in {' and '.join(map(str, ranks))}": (stage, ranks)
    for stage in STAGES
    for ranks in ([0], [1])
    if stage not in FIRST_ALONE or ranks == [0]
} | {"reconstruct in 0 and 1": ("reconstruct", [0, 1])}
IMAGES = 7
LAYERS = ["net.1", "net.3"]
QUICK: dict[str, Any] = {"layers": "net.1", "compare": []}


class Still(LitNet):
    """Learns nothing, so that any number of processes sees the same weights."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0)


class Uneven(IterableDataset):
    """Has images in one process alone."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[Any]:
        if torch.distributed.get_rank() == self.rank:
            yield from zip(*images_and_labels(4), strict=True)


def fit(
    folder: Path, model: LitNet, devices: int, *others: Any, val: Any = None, **options: Any
) -> tuple[Any, set[str]]:
    images = TensorDataset(*images_and_labels(IMAGES))
    given: dict[str, Any] = {"layers": LAYERS, "channels": "all", "probe": 2, "compare_images": 1}
    callback = DeconvCallback(**(given | options))
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(
        folder,
        *others,
        callback,
        devices=devices,
        strategy=strategy,
        max_epochs=2 if others else 1,
        accelerator="cpu",
    )
    val = DataLoader(images if val is None else val, 2)

    def go() -> None:
        run.fit(model, DataLoader(images, 2), val)

    try:
        _, warned = recorded(go)
    finally:
        assert hooks_on(model) == 0
    return run, {text for text in warned if "DeconvCallback" in text}


def unnoticed(folder: Path, devices: int) -> dict[bool, Any]:
    """What a run comes to without the callback and with it at its defaults."""
    found: dict[bool, Any] = {}
    images = TensorDataset(*images_and_labels(IMAGES))
    for with_it in (False, True):
        seeded()
        model = LitNet(tiny_net(norm=True, p=0.5))
        callbacks = [DeconvCallback(on_error="raise")] if with_it else []
        run = trainer(
            folder / f"callback {with_it}",
            *callbacks,
            devices=devices,
            strategy="ddp",
            accelerator="cpu",
        )
        run.fit(model, DataLoader(images, 2, shuffle=True), DataLoader(images, 2))
        metrics = {k: v for k, v in run.callback_metrics.items() if not k.startswith("deconv")}
        found[with_it] = {
            "weights": dict(model.state_dict()),
            "momenta": run.optimizers[0].state_dict()["state"],
            "metrics": metrics,
            "random": random_states(),
        }
    return found


def main(folder: Path, devices: int) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    hang = gallery.Gallery.hang

    def hanging(own: Any, pictures: Any, *rest: Any) -> Any:
        seen[pictures.layer] = pictures
        return hang(own, pictures, *rest)

    gallery.Gallery.hang = hanging  # type: ignore[method-assign, assignment]
    seeded()
    run, warned = fit(folder / "none", Still(), devices)
    assert not warned, warned
    # in every process, as other callbacks may monitor it
    assert "deconv/net.1/cosine_NeuronDeconvolution" in run.callback_metrics
    if run.global_rank == 0:
        torch.save(seen, folder / f"{devices}.pt")
    if devices == 1:
        return
    found: dict[str, Any] = {}
    for fault in ["", *FAULTS]:
        stage, ranks = FAULTS.get(fault, ("share", []))
        seeded()
        model = LitNet()
        breaking = Breaking(*STAGES[stage], "on purpose", ranks)
        _, warned = fit(folder / (fault or "no fault"), model, devices, breaking, **QUICK)
        found[fault] = model.state_dict(), warned
    for rank in range(2):
        seeded()
        model = LitNet()
        seen.clear()
        _, warned = fit(folder / f"images in {rank}", model, devices, val=Uneven(rank), **QUICK)
        found[f"images in {rank}"] = model.state_dict(), warned, dict(seen)
    strict = Breaking(*STAGES["reconstruct"], "on purpose", [1])
    # raised in both processes: neither goes on without the other
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(folder / "strict", LitNet(), devices, strict, on_error="raise", **QUICK)
    if run.global_rank == 0:
        torch.save(found, folder / "faults.pt")
        torch.save(unnoticed(folder, devices), folder / "unnoticed.pt")
    else:
        unnoticed(folder, devices)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

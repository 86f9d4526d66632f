"""What each of two processes runs: the same fits, some with a failure in the second process alone.

Not a test: `test_processes` starts it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from callback_models import LitNet, hooks_on, images_and_labels, recorded, seeded, trainer
from lit_deconv.callbacks import DeconvCallback, gallery, session, strongest
from torch.utils.data import DataLoader, TensorDataset

FAULTS: dict[str, tuple[Any, str]] = {
    "ranking": (strongest.Collector, "see"),
    "share": (strongest.Collection, "share"),
    "merge": (strongest.Collection, "merge"),
    "patches": (strongest, "reconstruct_top"),
    "begin": (session.Watch, "begin"),
}
IMAGES = 7


class Still(LitNet):
    """Learns nothing, so that any number of processes sees the same weights."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0)


def fit(folder: Path, model: LitNet, devices: int) -> tuple[Any, set[str]]:
    images = TensorDataset(*images_and_labels(IMAGES))
    callback = DeconvCallback(layers=["net.1", "net.3"], channels="all", probe=2, compare_images=1)
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(folder, callback, devices=devices, strategy=strategy, max_epochs=1)
    _, warned = recorded(lambda: run.fit(model, DataLoader(images, 2), DataLoader(images, 2)))
    assert hooks_on(model) == 0
    return run, {text for text in warned if "DeconvCallback" in text}


def main(folder: Path, devices: int) -> None:
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}
    hang = gallery.Gallery.hang

    def hanging(own: Any, pictures: Any, *rest: Any) -> Any:
        seen[pictures.layer] = pictures.channels, pictures.health, pictures.ranked
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
        where, name = FAULTS.get(fault, (None, ""))
        original = getattr(where, name, None)
        if fault and run.global_rank == 1:

            def fail(*args: Any, **kwargs: Any) -> Any:
                raise torch.OutOfMemoryError("in the second process")

            setattr(where, name, fail)
        seeded()
        model = LitNet()
        _, warned = fit(folder / (fault or "no fault"), model, devices)
        if original is not None:
            setattr(where, name, original)
        found[fault] = model.state_dict(), warned
    if run.global_rank == 0:
        torch.save(found, folder / "faults.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

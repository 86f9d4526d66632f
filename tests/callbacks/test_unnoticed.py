"""Training cannot tell that the callback is there: equal to the bit, in every kind of run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_models import (
    EPOCHS,
    LitNet,
    compiled,
    equal,
    expected_tags,
    hooks_on,
    loader,
    pictures,
    random_states,
    recorded,
    scalars,
    seeded,
    tiny_net,
    trainer,
)
from lit_deconv.callbacks import DeconvCallback
from torch import nn


class FrozenNorm(LitNet):
    """A batch norm that stays in eval mode, with frozen weights, while the rest trains."""

    def __init__(self) -> None:
        super().__init__(tiny_net(norm=True, p=0.3))
        self.net[1].requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self.net[1].eval()
        return self


class CompiledPart(LitNet):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.net = torch.compile(tiny_net(norm=True), backend=backend)


class CompiledByInductor(LitNet):
    """As small as can be: its kernels are built by a C++ compiler."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        )
        self.net = torch.compile(self.net, backend="inductor")


class CompiledInPlace(LitNet):
    def __init__(self) -> None:
        super().__init__(tiny_net(norm=True))
        self.net.compile(backend="eager")


class Quiet(LitNet):
    """Logs outside its steps: Lightning's `log` is no part of what is compiled."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.last = self.loss(batch)

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self.last)


def compiled_whole(backend: str) -> nn.Module:
    return compiled(Quiet(tiny_net(norm=True)), backend)


Make = Callable[[], Any]
PLAIN, NORMED = ("net.1", "net.4"), ("net.2", "net.5")
CASES: dict[str, tuple[Make, tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "plain": (LitNet, PLAIN, {}, {}),
    "dropout and batch norm": (lambda: LitNet(tiny_net(norm=True, p=0.5)), NORMED, {}, {}),
    "two workers": (lambda: LitNet(tiny_net(p=0.5)), PLAIN, {}, {"num_workers": 2}),
    "accumulation": (lambda: LitNet(tiny_net(norm=True)), NORMED, {"accumulate_grad_batches": 2}, {}),
    "bf16-mixed": (lambda: LitNet(tiny_net(norm=True, p=0.5)), NORMED, {"precision": "bf16-mixed"}, {}),
    "no sanity check": (lambda: LitNet(tiny_net(p=0.5)), PLAIN, {"num_sanity_val_steps": 0}, {}),
    "compiled part": (lambda: CompiledPart("eager"), NORMED, {}, {}),
    "compiled part, no sanity check": (
        lambda: CompiledPart("eager"), NORMED, {"num_sanity_val_steps": 0}, {},
    ),
    "compiled in place": (CompiledInPlace, NORMED, {}, {}),
    "compiled whole": (lambda: compiled_whole("eager"), NORMED, {}, {}),
    "compiled by inductor": (CompiledByInductor, ("net.1",), {}, {}),
    "frozen batch norm": (FrozenNorm, NORMED, {}, {}),
}  # fmt: skip


class Watcher(pl.Callback):
    """Notes what training could notice at each of its batches."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        flags = [module.training for module in pl_module.modules()]
        wanted = [p.requires_grad for p in pl_module.parameters()]
        self.seen.append((random_states(), flags, wanted, hooks_on(pl_module)))


def fit(folder: Path, make: Make, own: dict[str, Any], loading: dict[str, Any], *added: Any) -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    seeded()
    model, watcher = make(), Watcher()
    runs = trainer(folder, *added, watcher, **own)
    runs.fit(model, loader(shuffle=True, **loading), loader(**loading))
    metrics = {k: v for k, v in runs.callback_metrics.items() if not k.startswith("deconv")}
    return {
        "weights": model.state_dict(),
        "momenta": runs.optimizers[0].state_dict()["state"],
        "gradients": [p.grad for p in model.parameters()],
        "metrics": metrics,
        "random": random_states(),
        "seen": watcher.seen,
        "hooks": hooks_on(model),
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_bit_with_every_picture_and_no_warning(case: str, tmp_path: Path) -> None:
    if "inductor" in case and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile's inductor needs a C++ compiler")
    make, layers, own, loading = CASES[case]
    without, warned = recorded(lambda: fit(tmp_path / "without", make, own, loading))
    callback = DeconvCallback()
    seen, warned_too = recorded(lambda: fit(tmp_path / "with", make, own, loading, callback))
    for what, value in without.items():
        assert equal(value, seen[what]), what
    assert warned_too - warned == set()
    found = pictures(tmp_path / "with")
    steps = scalars(tmp_path / "with")["val_loss"].keys()
    assert len(steps) == EPOCHS
    assert found.keys() == expected_tags(*layers)
    assert all(images.keys() == steps for images in found.values())


def test_the_watcher_would_notice(tmp_path: Path) -> None:
    class Noticed(pl.Callback):
        def on_validation_epoch_end(self, *args: Any) -> None:
            torch.rand(1)

    make, _, own, loading = CASES["dropout and batch norm"]
    without = fit(tmp_path / "without", make, own, loading)
    noticed = fit(tmp_path / "with", make, own, loading, Noticed())
    assert not equal(without["weights"], noticed["weights"])
    assert not equal(without["seen"], noticed["seen"])

"""What `lit-deconv demo` trains: the small ZFNet on generated pictures, ready for a Trainer."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import seed_everything

from lit_deconv.examples.datamodules import Composites
from lit_deconv.examples.zfnet import ZFNet


class Demo(NamedTuple):
    """All but the callbacks and the logger: `Trainer(**trainer_kwargs).fit(module, datamodule)`."""

    module: ZFNet
    datamodule: Composites
    trainer_kwargs: dict[str, Any]


def build_demo(small: bool = False, seed: int = 0, cache: str | None = None) -> Demo:
    """Build the demo; seeds Python, NumPy and torch, so that two runs agree.

    Args:
        small: few pictures, one epoch, a narrow network: seconds, for tests.
        seed: of the pictures, the weights and the order of the batches.
        cache: folder for the drawn pictures; None for the user's cache folder.
    """
    seed_everything(seed, verbose=False)
    if small:
        datamodule = Composites(200, 50, seed=seed, cache=cache, batch_size=20)
        module, epochs = ZFNet(datamodule.num_classes, width=8), 1
    else:
        datamodule = Composites(seed=seed, cache=cache)
        module, epochs = ZFNet(datamodule.num_classes), 7
    return Demo(
        module,
        datamodule,
        {"max_epochs": epochs, "accelerator": "auto", "devices": 1, "log_every_n_steps": 10},
    )

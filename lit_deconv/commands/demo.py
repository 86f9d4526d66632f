"""`lit-deconv demo`: a ZFNet learns generated pictures while DeconvCallback watches it."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from lit_deconv.commands.tensorboard import relative, tensorboard_command


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `demo`."""
    parser.add_argument(
        "--small", action="store_true", help="few pictures, a narrow network, one epoch: seconds"
    )
    parser.add_argument(
        "--max_epochs", type=PositiveInt, default=None, help="epochs, if not those of the demo"
    )
    parser.add_argument(
        "--output", type=str, default="logs", help="folder for logs and checkpoints"
    )


def run(options: Namespace) -> None:
    """Train, then print what came of it and how to look at it."""
    # Imported here, so that `lit-deconv --help` waits for neither torch nor Lightning.
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger

    from lit_deconv.callbacks import DeconvCallback
    from lit_deconv.examples.demo import build_demo

    demo = build_demo(small=options.small)
    trainer_kwargs: dict[str, Any] = dict(demo.trainer_kwargs)
    if options.max_epochs is not None:
        trainer_kwargs["max_epochs"] = options.max_epochs
    logger = TensorBoardLogger(save_dir=options.output, name="demo")
    trainer = Trainer(**trainer_kwargs, logger=logger, callbacks=[DeconvCallback()])
    trainer.fit(demo.module, datamodule=demo.datamodule)
    print(f"validation accuracy: {float(trainer.callback_metrics['val_acc']):.1%}")
    print(f"log folder: {relative(logger.log_dir)}")
    print(f"look at it: {tensorboard_command(logger.log_dir)}")

"""`lit-deconv fit`, `validate` and `test`: LightningCLI, with packaged configs by name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.resources import as_file, files

from lit_deconv.commands.tensorboard import relative, tensorboard_command

PREFIX = "lit_deconv:"
"""Marks the name of a packaged config, as in `--config lit_deconv:imagefolder`."""


def run(words: list[str]) -> None:
    """Hand a command line over to LightningCLI, then say how to look at what was logged.

    Args:
        words: the subcommand and what follows it.
    """
    with ExitStack() as stack:
        arguments = list(_with_packaged_configs(words, stack))
        # LightningCLI warns of arguments that differ from sys.argv, and launches processes by it.
        stack.callback(setattr, sys, "argv", sys.argv)
        sys.argv = [sys.argv[0], *arguments]
        # Imported here: Lightning takes seconds, and an unknown config can be told at once.
        from lightning.pytorch import LightningDataModule, LightningModule
        from lightning.pytorch.cli import LightningCLI
        from lightning.pytorch.loggers import TensorBoardLogger

        cli = LightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # Errors are told by `main`, in one line.
            parser_kwargs={"prog": "lit-deconv", "exit_on_error": False},
        )
    for logger in cli.trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and cli.trainer.is_global_zero:
            print(f"log folder: {relative(logger.log_dir)}")
            print(f"look at it: {tensorboard_command(logger.log_dir)}")


def packaged_configs() -> list[str]:
    """Names of the configs that come with the package."""
    found = (entry.name for entry in files("lit_deconv.configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def _with_packaged_configs(words: list[str], stack: ExitStack) -> Iterator[str]:
    """Replace the name of each packaged config by the path of its file, open until `stack` is."""
    option = ""
    for word in words:
        flag, equals, value = word.rpartition("=")
        if (flag or option) in ("--config", "-c") and value.startswith(PREFIX):
            yield f"{flag}{equals}{_path_of(value.removeprefix(PREFIX), stack)}"
        else:
            yield word
        option = word


def _path_of(name: str, stack: ExitStack) -> str:
    names = packaged_configs()
    if name not in names:
        raise ValueError(
            f"no packaged config is named {name!r}; there are: {', '.join(names)} "
            "(a file of your own goes by its path)"
        )
    return str(stack.enter_context(as_file(files("lit_deconv.configs") / f"{name}.yaml")))

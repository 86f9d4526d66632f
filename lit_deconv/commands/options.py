"""Options that subcommands share; importing this imports neither torch nor Lightning."""

from __future__ import annotations

from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser
from jsonargparse.typing import PositiveInt

EXIT_CODES = "Exit codes: 0 done; 1 interrupted, what is finished stays; 2 wrong use or a failure."


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add the options that name a model and the device it runs on."""
    parser.add_argument(
        "--model",
        type=str,
        default=None,
        help="a torchvision model (resnet18), or module:function of your own that returns an nn.Module",
    )
    parser.add_argument(
        "--weights",
        type=str,
        default=None,
        help="a torchvision model's weights, by enum: DEFAULT, IMAGENET1K_V1; else they are random",
    )
    parser.add_argument(
        "--state-dict", type=str, default=None, help="file with the weights for --model"
    )
    parser.add_argument(
        "--checkpoint", type=str, default=None, help="a Lightning checkpoint; needs --class"
    )
    parser.add_argument(
        "--class",
        type=str,
        default=None,
        help="class path of the checkpoint's LightningModule, such as my_project.models.Net",
    )
    parser.add_argument(
        "--model-args",
        type=dict[str, Any],
        default={},
        help="arguments for the model as JSON, such as '{\"num_classes\": 10}'",
    )
    parser.add_argument(
        "--unsafe-load",
        action="store_true",
        help="unpickle any object in a checkpoint or state dict, which can run code: "
        "only for files that you trust",
    )
    parser.add_argument(
        "--device",
        type=str,
        default="auto",
        help="auto (a GPU where there is one), cpu, cuda, cuda:1",
    )


def add_picture_arguments(parser: ArgumentParser) -> None:
    """Add the options that say how pictures become inputs."""
    parser.add_argument(
        "--size",
        type=str,
        default=None,
        help="pixels the model takes: 224, or HxW; by default what the weights or the checkpoint say, "
        "else the size of the first picture",
    )
    parser.add_argument(
        "--datamodule",
        type=str,
        default=None,
        help="class path of the LightningDataModule of the training, whose mean and std are taken",
    )
    for name, what in (("mean", "subtracted from"), ("std", "divided out of")):
        parser.add_argument(
            f"--{name}",
            type=str,
            default=None,
            help=f"{what} each channel of pictures with values from 0 to 1, such as 0.5 or "
            "0.485,0.456,0.406; by default what the weights or the data module say",
        )


def add_layer_arguments(parser: ArgumentParser) -> None:
    """Add the options that say which layers, and how many channels and units of each."""
    parser.add_argument(
        "--layers",
        type=str,
        default="auto",
        help="names and globs separated by commas (features.3,layer?.1; of a glob, those "
        "with feature maps), or auto: the last activation "
        "before each downsampling; `lit-deconv layers` lists them",
    )
    parser.add_argument(
        "--channels",
        type=str,
        default="16",
        help="of each layer: how many, evenly spaced (16); which (3,7,12, or 3, for one alone); or all",
    )
    parser.add_argument("--top-k", type=PositiveInt, default=9, help="units of each channel")


def add_output_arguments(parser: ArgumentParser, output: str) -> None:
    """Add the options that say what is written where.

    Args:
        parser: The subcommand's.
        output: The folder unless the user names another.
    """
    parser.add_argument(
        "--batch-size", type=PositiveInt, default=16, help="pictures in one forward pass"
    )
    parser.add_argument("--output", type=str, default=output, help="folder for what comes out")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write report.html too: one page with all figures, opens from disk",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what the folder holds")


def add_general_arguments(parser: ArgumentParser) -> None:
    """Add what every subcommand of ours has."""
    parser.add_argument("--config", action=ActionConfigFile, help="read options from a YAML file")
    parser.add_argument("--json", action="store_true", help="write the result to stdout as JSON")

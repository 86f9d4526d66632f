"""`lit-deconv top`: what activates each channel most in a whole data set, figure 2 of the paper."""

from __future__ import annotations

import json
import sys
from argparse import Action
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt

from lit_deconv.commands.options import (
    EXIT_CODES,
    add_general_arguments,
    add_layer_arguments,
    add_model_arguments,
    add_output_arguments,
    add_picture_arguments,
)

EPILOG = f"""
Examples: `lit-deconv top photos/ --model resnet18 --weights DEFAULT --report`;
`lit-deconv top photos/ --model resnet50 --layers '**.conv?,**.downsample.0' --channels all --raw none`;
`lit-deconv top --datamodule my_project.Data --checkpoint last.ckpt --class my_project.Net --devices 4`.
The data are passed over once, whatever is asked for; the images that win are read once more.
What it takes of memory and disk is said first (--estimate says no more than that).
A run that was stopped, by whatever, goes on when the same command is given again.
{EXIT_CODES} --debug shows the traceback of a failure.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `top`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "images",
        type=str,
        nargs="*",
        action=_Given,
        default=[],
        help="pictures: files, folders (everything below) and globs; none: the data module's",
    )
    add_model_arguments(parser)
    add_layer_arguments(parser)
    add_picture_arguments(parser)
    parser.add_argument(
        "--datamodule-args",
        type=dict[str, Any],
        default={},
        help='arguments for the data module as JSON, such as \'{"root": "photos"}\'',
    )
    parser.add_argument(
        "--split",
        type=str,
        default="val",
        help="which of the data module's images: val, train, test or predict, in their order",
    )
    parser.add_argument(
        "--devices",
        type=PositiveInt,
        default=1,
        help="so many GPUs, or processes on the CPU, share the images",
    )
    parser.add_argument(
        "--workers",
        type=NonNegativeInt | None,
        default=None,
        help="processes that read images, for each device; by default one a core, at most 8",
    )
    parser.add_argument(
        "--raw",
        type=str,
        default="float32",
        help="the raw reconstructions, the most of what lies on disk: float32, float16 or none",
    )
    add_output_arguments(parser, "top")
    parser.add_argument(
        "--estimate", action="store_true", help="say what it takes of memory and disk, then end"
    )
    add_general_arguments(parser)


class _Given(Action):
    """Keeps what a config file says where the command line says nothing."""

    def __call__(
        self, parser: object, namespace: object, values: object, option: str | None = None
    ) -> None:
        if values:
            setattr(namespace, self.dest, values)


def run(options: Namespace) -> None:
    """Do it, then print what came of it and how to look at it."""
    # Imported here, so that `lit-deconv --help` waits for no torch.
    from lit_deconv.commands.tensorboard import relative, tensorboard_command
    from lit_deconv.commands.top_run import top

    index = top(options)
    if index is None:  # another process of this run tells
        return
    if options.json:
        json.dump(index, sys.stdout, indent=1)
        print()
        return
    if options.estimate:
        return
    for name, layer in index["layers"].items():
        print(f"{name}: {layer['units']} reconstructions, by {layer['path']}")
    doubtful = sum(layer["doubtful"] for layer in index["layers"].values())
    if doubtful:
        print(f"left out: {doubtful}, whose activation came out different when computed anew")
    if index["skipped"]:
        print(f"skipped: {len(index['skipped'])} of {index['pictures']} images, unreadable")
    folder = relative(options.output)
    print(f"figures: {len(index['figures'])} under {folder}; index: {folder}/index.json")
    if options.report:
        print(f"report: {folder}/report.html")
    print(f"look at it: {tensorboard_command(f'{folder}/tensorboard')}")

"""`lit-deconv attribute`: a model, pictures and layers in; reconstructions, figures and a report out."""

from __future__ import annotations

import json
import sys
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lit_deconv.commands.options import (
    EXIT_CODES,
    add_general_arguments,
    add_layer_arguments,
    add_model_arguments,
    add_output_arguments,
    add_picture_arguments,
)

EPILOG = f"""
Examples: `lit-deconv attribute pictures/ --model resnet18 --weights DEFAULT --report`;
`lit-deconv attribute cat.jpg --checkpoint last.ckpt --class my_project.Net --layers 'features.*'`;
`lit-deconv attribute cat.jpg --model my_module:build --seed 12,5,7 --compare NeuronDeconvolution`.
{EXIT_CODES} --debug shows the traceback of a failure.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `attribute`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "images",
        type=str,
        nargs="+",
        help="pictures: files, folders (everything below) and globs",
    )
    add_model_arguments(parser)
    add_layer_arguments(parser)
    parser.add_argument(
        "--seed",
        type=str,
        default="strongest",
        help="what is projected down: strongest (of each channel the strongest units over the "
        "pictures), or on every picture layer (the whole of it), C (feature map C), or C,Y,X (the "
        "unit of map C at row Y, column X)",
    )
    parser.add_argument(
        "--compare",
        type=str,
        default="",
        help="Captum's attributions to set beside ours, by class name, separated by commas: "
        "NeuronDeconvolution,Saliency (for strongest, beside the strongest unit of each channel)",
    )
    parser.add_argument(
        "--compare-args",
        type=dict[str, dict[str, Any]],
        default={},
        help='arguments for them, as JSON: \'{"IntegratedGradients": {"n_steps": 20}}\'',
    )
    add_picture_arguments(parser)
    add_output_arguments(parser, "attributions")
    add_general_arguments(parser)


def run(options: Namespace) -> None:
    """Do it, then print what came of it and how to look at it."""
    # Imported here, so that `lit-deconv --help` waits for no torch.
    from lit_deconv.commands.attribution import attribute
    from lit_deconv.commands.tensorboard import relative, tensorboard_command

    results = attribute(options)
    index = results.index
    if options.json:
        json.dump(index, sys.stdout, indent=1)
        print()
        return
    for name, layer in index["layers"].items():
        units = sum(unit["layer"] == name for unit in index["units"])
        print(f"{name}: {units} reconstructions, by {layer['path']}")
    if index["skipped"]:
        print(f"skipped: {len(index['skipped'])} of {len(index['pictures'])} pictures, unreadable")
    folder = relative(str(results.folder))
    print(f"figures: {len(index['figures'])} under {folder}; index: {folder}/index.json")
    if options.report:
        print(f"report: {folder}/report.html")
    print(f"look at it: {tensorboard_command(f'{folder}/tensorboard')}")

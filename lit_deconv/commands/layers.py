"""`lit-deconv layers`: what can be looked at in a model, as a table."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from lit_deconv.commands.options import EXIT_CODES, add_general_arguments, add_model_arguments

if TYPE_CHECKING:
    from lit_deconv.commands.models import Loaded

COLUMNS = ("", "name", "type", "output", "field", "stride", "path")

EPILOG = f"""
The names go into `lit-deconv attribute --layers` and DeconvCallback(layers=...); globs are names too:
`features.*`. Example: `lit-deconv layers --model resnet18`.
{EXIT_CODES} --debug shows the traceback of a failure.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `layers`."""
    parser.epilog = EPILOG
    add_model_arguments(parser)
    parser.add_argument(
        "--size",
        type=str,
        default=None,
        help="pixels the model takes: 224, or HxW; by default what its weights or checkpoint say, else 224",
    )
    parser.add_argument(
        "--layers", type=str, default="", help="only these: names and globs separated by commas"
    )
    add_general_arguments(parser)


def run(options: Namespace) -> None:
    """Print the table, or JSON."""
    from lit_deconv.commands.models import load

    loaded = load(options)
    rows = table(loaded, options.size, options.layers)
    if options.json:
        json.dump(rows, sys.stdout, indent=1)
        print()
        return
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    for line in cells:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    print(f"\n{len(rows)} layers; * marks what is looked at when no layer is named.")


def table(loaded: Loaded, size: str | None, only: str = "") -> list[dict[str, Any]]:
    """One row for each module that runs and returns a tensor.

    Args:
        loaded: The model.
        size: What the user said of its input, None: nothing.
        only: Names and globs separated by commas; empty: all.
    """
    import torch

    from lit_deconv.attr import Deconvnet
    from lit_deconv.commands.models import takes_channels
    from lit_deconv.commands.observing import observe
    from lit_deconv.commands.pictures import LARGEST_UNASKED, parsed_size
    from lit_deconv.engine.errors import DeconvError
    from lit_deconv.layers import automatic, named_layers, resolve

    side = int(loaded.presets.get("size", LARGEST_UNASKED))
    extents = parsed_size(size) or (side, side)
    blank = torch.zeros(1, takes_channels(loaded.model), *extents, device=loaded.device)
    observations = observe(loaded.model, blank)
    chosen = set(automatic(observations))
    names = [part.strip() for part in only.split(",") if part.strip()]
    wanted = resolve(loaded.model, names) if names else named_layers(loaded.model)
    seen = [o for o in observations if o.name in wanted]
    known = named_layers(loaded.model)

    def described(layers: list[str]) -> dict[str, dict[str, Any]]:
        """The way back from each; one at a time where some of them has none."""
        try:
            net = Deconvnet(loaded.model, layers, call=-1)
            fields, explained = net.receptive_field(blank), net.explain(blank)
        except DeconvError as error:
            if len(layers) == 1:
                return {layers[0]: {"path": None, "why": str(error)}}
            return {name: row for layer in layers for name, row in described([layer]).items()}
        return {
            name: {
                "field": list(fields[name].size),
                "stride": list(fields[name].stride),
                "whole_image": list(fields[name].whole),
                "path": explained[name].path,
                "why": "; ".join(explained[name].reasons),
                "captum_faults": list(explained[name].captum_faults),
            }
            for name in layers
        }

    ways = described([o.name for o in seen if o.shape]) if any(o.shape for o in seen) else {}
    return [
        {
            "name": o.name,
            "type": type(known[o.name]).__name__,
            "output": list(o.shape[1:]),
            "calls": o.calls,
            "automatic": o.name in chosen,
            **ways.get(o.name, {"path": None, "why": "returns no tensor"}),
        }
        for o in seen
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    field, stride = "", ""
    if "field" in row:
        field = "image" if all(row["whole_image"]) else _by(row["field"])
        stride = "" if all(row["whole_image"]) else _by(row["stride"])
    path = row["path"] or f"none: {row['why']}"
    if row["calls"] > 1:
        path += f" (runs {row['calls']} times)"
    return (
        "*" if row["automatic"] else "",
        row["name"],
        row["type"],
        _by(row["output"]),
        field,
        stride,
        path,
    )


def _by(extents: list[int | None]) -> str:
    return " x ".join("?" if extent is None else str(extent) for extent in extents)

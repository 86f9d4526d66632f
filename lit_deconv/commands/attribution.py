"""What `lit-deconv attribute` does, from its options to the output folder."""

from __future__ import annotations

import sys

import torch
from jsonargparse import Namespace

from lit_deconv.attr import Deconvnet
from lit_deconv.commands.job import Job, fitting
from lit_deconv.commands.models import imported, load, normalisation_of, takes_channels
from lit_deconv.commands.observing import chosen_layers
from lit_deconv.commands.picture_figures import picture_figures
from lit_deconv.commands.pictures import Pictures, find_pictures, view_of
from lit_deconv.commands.report import write_report
from lit_deconv.commands.results import Results, prepared_folder
from lit_deconv.commands.seeds import Seed
from lit_deconv.commands.strongest_figures import strongest_figures


def attribute(options: Namespace) -> Results:
    """Load, reconstruct, draw and write.

    Args:
        options: Those of `lit-deconv attribute`.

    Returns:
        What was written.
    """
    # What can be told without loading anything is told first.
    seed = Seed.of(options.seed)
    paths = find_pictures(options.images)
    folder = prepared_folder(options.output, options.force)
    methods = _methods(options.compare)
    loaded = load(options)
    presets = dict(loaded.presets)
    if options.datamodule is not None:
        presets.update(normalisation_of(imported(options.datamodule, ".", "--datamodule")))
    view = view_of(options, presets, takes_channels(loaded.model), paths)
    pictures = Pictures(paths, view)
    note = " ".join(filter(None, [f"Model: {loaded.name}.", loaded.note, view.note]))
    blank = torch.zeros(1, view.channels, *view.size, device=loaded.device)
    with fitting(loaded.name, blank.shape):
        net = Deconvnet(loaded.model, chosen_layers(loaded.model, blank, options.layers))
        job = Job(options, net, loaded.device, pictures, seed, methods, blank, note)
    about = {
        "model": loaded.name,
        "note": note,
        "seed": options.seed,
        "compare": methods,
        "input": view.described(),
        "device": str(loaded.device),
        "pictures": [str(path) for path in paths],
        "skipped": pictures.skipped,
    }
    results = Results(folder, about)
    complete = False
    try:
        if seed.kind == "strongest":
            strongest_figures(job, results)
        else:
            picture_figures(job, results)
        complete = True
    except KeyboardInterrupt:
        done = ", ".join(job.finished) or "none"
        print(f"stopped; layers finished: {done}; what there is stays in {folder}", file=sys.stderr)
        raise
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of memory on {loaded.device}; try a smaller --batch-size") from error
    finally:
        results.close(complete)
    if options.report:
        write_report(folder / "report.html", results.index, job.layers, job.cards)
    return results


def _methods(text: str) -> list[str]:
    """Captum's classes that a user named; an unknown one is told before anything is loaded."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names:
        from lit_deconv.compare import attribution_class

        for name in names:
            attribution_class(name)
    return names

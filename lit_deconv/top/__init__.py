"""The strongest activations of each channel over a data set, mergeable across processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_deconv.top.collector import Collector
from lit_deconv.top.counting import REDUCTIONS, Counted, TopOfProcess, settle
from lit_deconv.top.examples import Examples
from lit_deconv.top.identity import NOT_COUNTED, batch_indices, hashed, several_processes
from lit_deconv.top.loop import collect_top
from lit_deconv.top.memory import MAX_BYTES, LayerBytes, estimate, total_bytes
from lit_deconv.top.reconstruction import TopReconstructions, reconstruct_top, tolerance
from lit_deconv.top.result import Images, LayerTop, TopActivations, of_all_processes
from lit_deconv.top.sources import DatasetImages, SpilledImages, images_of

if TYPE_CHECKING:
    from lit_deconv.top.metric import TopUnits

__all__ = [
    "MAX_BYTES",
    "NOT_COUNTED",
    "REDUCTIONS",
    "Collector",
    "Counted",
    "DatasetImages",
    "Examples",
    "Images",
    "LayerBytes",
    "LayerTop",
    "SpilledImages",
    "TopActivations",
    "TopOfProcess",
    "TopReconstructions",
    "TopUnits",
    "batch_indices",
    "collect_top",
    "estimate",
    "hashed",
    "images_of",
    "of_all_processes",
    "reconstruct_top",
    "settle",
    "several_processes",
    "tolerance",
    "total_bytes",
]


def __getattr__(name: str) -> Any:
    if name == "TopUnits":  # imported when asked for, as it imports torchmetrics
        from lit_deconv.top.metric import TopUnits

        return TopUnits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

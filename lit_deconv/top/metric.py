"""The strongest units of one layer as a metric: state that merges across processes by a reduction.

Apart from what one process keeps, as torchmetrics takes longer to import than a few pictures take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

from lit_deconv.top.counting import REDUCTIONS, TopOfProcess


class TopUnits(TopOfProcess, Metric):
    """Per channel the k largest activations over the images of all processes, at most one an image.

    ``compute`` merges across processes. The patches stay in the process that cut them. See
    ``TopOfProcess`` for how batches are looked at, and for the arguments; others go to ``Metric``.
    """

    full_state_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name, start in self.start().items():
            self.add_state(name, start, dist_reduce_fx=REDUCTIONS[name])

    def reset(self) -> None:
        """Forgets all images."""
        Metric.reset(self)
        super().reset()

    def on(self, device: torch.device) -> TopUnits:
        """Moves all that is kept to a device."""
        return self.to(device)

    def merged_elsewhere(self) -> None:
        """What is kept is of all processes: ``compute`` merges no more."""
        self.sync_on_compute = self._to_sync = False

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Module:
        moved = super()._apply(fn, exclude_state)
        self.rest_on(self.device)
        return moved

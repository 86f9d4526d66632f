"""Watches a validation that runs anyway: who runs on images, which layers, which probe images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lit_deconv.layers import automatic, named_layers, unwrapped

from .capture import Call, Capture, NoImageError, first_call
from .isolation import isolated
from .order import Given
from .peers import Peers
from .probe import Probe, joined, spread
from .strongest import Collection, Ranking

__all__ = ["Watch", "is_compiled", "probe_plan", "spread"]


class Watch:
    """What is found out once and kept for the whole run, and the hooks that find it out.

    Args:
        model: The LightningModule.
        layers: The chosen layers by name; empty: chosen from the first forward that is seen.
        entry: Name of the module whose input is wanted; None: the outermost that runs on images.
        input_key: Position, keyword or key of the images among its arguments.
        size: So many probe images are kept.
        ranking: Which of the layers' units are kept.
        rows: Which images of which batch were kept in the run that is continued; None: a new run.
        ranks: Whether units are ranked while batches run; else afterwards, on the kept images.
        peers: The processes that rank together.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        entry: str | None,
        input_key: int | str | None,
        size: int,
        ranking: Ranking | None = None,
        rows: Mapping[int, Sequence[int]] | None = None,
        ranks: bool = True,
        peers: Peers | None = None,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.entry = entry
        self.size = size
        self.rows = {batch: list(kept) for batch, kept in (rows or {}).items()}
        self.reads_on = ""
        """Name of a module with weights that ran after the entry: its output is no logits."""
        self.batches = 0
        """Batches seen."""
        self.compiled = is_compiled(model)
        self.ranking = ranking or Ranking()
        self.peers = peers
        self.ranks = ranks and not self.compiled
        self.collection: Collection | None = None
        """Ranks the units; None while nobody knows what runs."""
        self._resumed = bool(rows)
        self._known = False
        self._plan: dict[int, int] = {}
        self._parts: list[Probe] = []
        modules = {"": unwrapped(model), **named_layers(model)}
        self._capture = Capture(
            {n: m for n, m in modules.items() if not isinstance(m, torch.jit.ScriptModule)},
            entry,
            input_key,
        )

    @property
    def probe(self) -> Probe | None:
        """The probe images, None while there are none."""
        return joined(self._parts) if self._parts else None

    @property
    def module(self) -> nn.Module:
        """The module that runs on the images."""
        return unwrapped(self.model) if not self.entry else named_layers(self.model)[self.entry]

    @property
    def is_complete(self) -> bool:
        """Whether all probe images are there."""
        return not self._plan and bool(self._parts)

    def begin(self, batches: float) -> None:
        """A validation of so many batches begins; infinity: nobody knows how many."""
        self._capture.failure = None
        if self.collection is not None:
            self.collection.begin()
        self._plan = {}
        if not self._parts:
            counts = {b: len(rows) for b, rows in self.rows.items()} if self._resumed else None
            self._plan = counts or probe_plan(self.size, batches)

    def before(self, batch_idx: int, dataloader_idx: int = 0, given: Given | None = None) -> None:
        """A batch begins: hooks on, unless the model is compiled and would not fire them.

        Args:
            batch_idx: Its number.
            dataloader_idx: Its loader.
            given: What its loader gave.
        """
        self.batches += 1
        if self.compiled:
            return
        if self._is_planned(batch_idx, dataloader_idx):
            self._capture.attach(self._choose(batch_idx), every=not self._known and self.ranks)
        elif not self._known and self.ranks:
            self._capture.attach(lambda count: [0], every=True)
        elif self._known:
            self._capture.attach()
        self._capture.given = given or Given()

    def after(
        self,
        step: Callable[..., Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A batch ended: hooks off; what was caught becomes part of the probe.

        Args:
            step: The step that ran; a compiled model's is run once more, up to its first call.
            batch: What it was given.
            batch_idx: Its number.
            dataloader_idx: Its loader; probe images come from the first.

        Raises:
            NoImageError: When no call with images was seen.
        """
        self._capture.detach()
        if self._capture.failure is not None:
            failure, self._capture.failure = self._capture.failure, None
            raise failure
        planned = self._is_planned(batch_idx, dataloader_idx)
        if not planned and (self._known or not self.ranks):
            return
        if self.compiled:
            arguments = {
                "batch": batch,
                "batch_idx": batch_idx,
                "dataloader_idx": dataloader_idx,
                "dataloader_iter": None,
            }
            call = self._run_again(step, arguments, self._choose(batch_idx))
        else:
            call = self._capture.entry_call(self.layers)
        if not self._known:
            self._learn(call)
        if planned:
            self._keep(call, batch_idx)
        self._rank_again(call)

    def detach(self) -> None:
        """Takes off whatever hook is on."""
        self._capture.detach()

    def _is_planned(self, batch_idx: int, dataloader_idx: int) -> bool:
        return dataloader_idx == 0 and batch_idx in self._plan

    def _choose(self, batch_idx: int) -> Callable[[int], list[int]]:
        if self._resumed:
            return lambda count: [row for row in self.rows.get(batch_idx, [0]) if row < count]
        return lambda count: spread(count, self._plan.get(batch_idx, 1))

    def _run_again(
        self,
        step: Callable[..., Any],
        arguments: Mapping[str, Any],
        rows: Callable[[int], list[int]],
    ) -> Call:
        with isolated(self.model):
            call = first_call(self.model, step, arguments, self._capture, self.layers, rows)
            if not self._known and call.probe is not None:
                self._capture.attach(lambda count: [0])
                try:
                    args, kwargs = call.probe.arguments()
                    call.module(*args, **kwargs)
                finally:
                    self._capture.detach()
                seen = self._capture.entry_call(self.layers)
                seen.probe = call.probe
                call = seen
        return call

    def _rank_again(self, call: Call) -> None:
        # nobody knew the layers while this batch ran, the first of all; the others are not run again
        calls, self._capture.calls = self._capture.calls, []
        again = [each for each in calls if each.module is call.module and each.end and each.every]
        if self.collection is None or not again:
            return
        with isolated(self.model):
            for each in again:
                if each.every is not None:
                    indices = self._capture.given.indices
                    self.collection.run(each.every, each.precision, indices, each.by_hash)

    def _keep(self, call: Call, batch_idx: int) -> None:
        share = self._plan.pop(batch_idx)
        calls = [c for c in self._capture.calls if c.module is call.module and c.probe and c.end]
        caught = joined([c.probe for c in (calls or [call]) if c.probe is not None])
        self._parts.append(caught.take(spread(len(caught), share)))
        self.rows[batch_idx] = list(call.rows)
        missing = self.size - sum(len(part) for part in self._parts)
        if missing > 0 and not self._plan and not self._resumed:
            # smaller batches than were expected, or nobody knew how many: the next one helps out
            self._plan[batch_idx + 1] = missing

    def _learn(self, call: Call) -> None:
        if not self.layers:
            names = automatic(self._capture.observations(call))
            if not names:
                raise NoImageError(
                    f"no layer could be chosen: {call.name or type(call.module).__name__} ran no "
                    "convolution or activation that gives a feature map [N, C, H, W]; name the "
                    "layers with layers="
                )
            known = named_layers(self.model)
            self.layers = {name: known[name] for name in names}
        after = self._capture.after(call)
        self.reads_on = after[0].name if after else ""
        self.entry = call.name
        self._known = True
        self._capture.modules = {call.name: call.module, **self.layers}
        self._capture.entry = call.name
        assert call.probe is not None
        with isolated(self.model):
            self.collection = Collection(
                call.module, self.layers, call.probe, self.ranking, self.peers
            )
        self._capture.collection = self.collection if self.ranks else None
        rank_zero_info(
            f"DeconvCallback draws the layers {', '.join(self.layers)}; {self.collection.summary()}"
        )


def probe_plan(size: int, batches: float) -> dict[int, int]:
    """From which batches how many probe images come: spread over all, since folders are sorted.

    Args:
        size: How many images.
        batches: How many batches; infinity: the first is asked for all.
    """
    if batches in (0, float("inf")):
        return {0: size}
    chosen = spread(int(batches), size)
    share, rest = divmod(size, len(chosen))
    return {batch: share + (index < rest) for index, batch in enumerate(chosen)}


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model runs as a compiled graph, in which new hooks do not fire."""
    steps = ("training_step", "validation_step", "test_step")
    if any(_is_compiled_function(getattr(model, step, None)) for step in steps):
        return True
    return any(
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or _is_compiled_function(module.forward)
        for module in model.modules()
    )


def _is_compiled_function(function: object) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")

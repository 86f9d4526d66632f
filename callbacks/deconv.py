"""`DeconvCallback`: what a network's layers respond to, in pixels, at every validation of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lit_deconv.layers import named_layers, resolve
from lit_deconv.render import Look
from lit_deconv.top import MAX_BYTES

from .arguments import (
    FIGURES,
    checked_channels,
    checked_compare,
    checked_count,
    checked_figures,
    checked_key,
    checked_layers,
    checked_module,
    checked_norm,
    checked_on_error,
    checked_probe,
    checked_shown,
    checked_tag,
)
from .failures import EVERY_LAYER, Failures
from .gallery import Gallery
from .history import History
from .order import Order
from .peers import Peers
from .pictures import Wanted
from .session import Moment, Session
from .strongest import Ranking
from .watch import Watch, is_compiled

__all__ = ["DeconvCallback"]

_SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}
_MANUAL = (
    "without a validation loop the compiled training step would be run once more, which manual "
    "optimization does not allow; give the Trainer a validation loader"
)
_STAGES = ("fit", "validate", "test")


class DeconvCallback(pl.Callback):
    """Logs Zeiler-Fergus reconstructions of a model's layers at validation.

    Per layer, figure 2 of the paper: for some channels the nine strongest activations over the
    validation images, each projected back, beside its image patch; figure 4: how each channel's
    strongest reconstruction evolves over the epochs; and, for a few probe images that stay the same,
    the whole layer and its strongest unit beside Captum's attributions, with how far they agree.
    Nothing is run twice for the former: hooks look at the validation batches that run anyway. Beside
    the pictures, how the channels fare: numbers that other callbacks can monitor, and a table.

    Training does not notice: weights, random numbers, train flags, buffers and hooks are as they
    would be without it. Without a validation loop a training batch takes the validation's place.
    Pictures go to every logger that takes images, else to PNG files under the log folder.

    Args:
        layers: Names, globs (``features.*``; ``**`` crosses dots) or modules; null chooses the last
            activation before each downsampling, at most 5.
        channels: How many channels a layer, evenly spaced and the same all run long, so that dead
            ones are as likely to be seen as live ones; or a list of channel numbers; or "all".
        top_k: For how many images each channel's strongest unit is shown: 9 in the paper.
        probe: How many validation images are kept for the whole run, spread over the loader; or
            images of your own [N, C, H, W] as the model takes them, a tensor or the path of a file
            written by ``torch.save``.
        module: Dotted name of the module whose input are the images; null finds the outermost
            module that is called with images and runs the layers.
        input_key: Position, keyword or dict key of the images among that module's arguments; null
            takes the first batch of images.
        every_n_epochs: At most one validation epoch in so many is drawn, the first always.
        every_n_train_steps: At most one validation in so many training steps is drawn; null leaves
            it to ``every_n_epochs``.
        compare: Captum attributions set beside ours, by class name.
        compare_images: How many of the probe images are compared, and of how many channels the
            strongest unit.
        log: What is logged: "grid" (figure 2 of the paper), "evolution" (figure 4), "filters" of the
            first layer, "strongest_beside_captum" (the strongest units of a few channels beside
            Captum), "beside_captum" (the probe images), "channels" (a table of their numbers),
            "numbers" (scalars).
        max_bytes: Bound of the memory for the strongest units, 256 MiB by default; patches beyond
            it lie on disk. What they take is said once, after the first batch of validation.
        unhooked_images: How many images are kept for a model in which hooks do not fire, as it is
            compiled, and of the training batch where there is no validation. They are run once more.
        mean: What normalisation subtracted, one number or one per input channel; null asks the data
            module for ``mean`` and ``std``.
        std: What normalisation divided by.
        show_channels: Input channels that are drawn: one as grey, three as RGB; null draws 1 as
            grey, 3 as RGB and any other number as tiles.
        tag: First part of the names in the log.
        on_error: "warn" warns once for a picture that fails, and training goes on; "raise" stops.

    Raises:
        MisconfigurationException: For a value that cannot work; in ``setup`` for a layer or module
            that the model does not have, and for strategies that shard the weights.
    """

    def __init__(
        self,
        layers: str | nn.Module | list[str | nn.Module] | None = None,
        channels: int | list[int] | Literal["all"] = 16,
        top_k: int = 9,
        probe: int | str | Tensor = 8,
        module: str | None = None,
        input_key: int | str | None = None,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
        compare: Sequence[str] = ("NeuronDeconvolution", "Deconvolution"),
        compare_images: int = 4,
        log: Sequence[str] = FIGURES,
        max_bytes: int = MAX_BYTES,
        unhooked_images: int = 64,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
        show_channels: int | list[int] | None = None,
        tag: str = "deconv",
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        super().__init__()
        self.layers = checked_layers(layers)
        self.channels = checked_channels(channels)
        self.top_k = checked_count("top_k", top_k)
        self.probe = checked_probe(probe)
        self.module = checked_module(module)
        self.input_key = checked_key(input_key)
        self.every_n_epochs = checked_count("every_n_epochs", every_n_epochs)
        if every_n_train_steps is not None:
            every_n_train_steps = checked_count("every_n_train_steps", every_n_train_steps)
            if every_n_epochs != 1:
                raise MisconfigurationException(
                    f"DeconvCallback(every_n_epochs={every_n_epochs}, every_n_train_steps="
                    f"{every_n_train_steps}): give one of them"
                )
        self.every_n_train_steps = every_n_train_steps
        self.compare = checked_compare(compare)
        self.figures = checked_figures(log)
        self.max_bytes = checked_count("max_bytes", max_bytes)
        self.unhooked_images = checked_count("unhooked_images", unhooked_images)
        self.compare_images = checked_count("compare_images", compare_images)
        self.norm = checked_norm(mean, std)
        self.show_channels = checked_shown(show_channels)
        self.tag = checked_tag(tag)
        self.on_error = checked_on_error(on_error)

        self._failures = Failures(self.on_error)
        self._sessions: dict[str, Session] = {}
        self._chosen: dict[str, nn.Module] = {}
        self._kept: dict[str, Any] = {}
        self._history = History()
        self._drawn_epoch: int | None = None
        self._drawn_step: int | None = None
        self._due = self._seen = False
        self._order = Order()
        self._gallery: Gallery | None = None
        self._said = ""
        self._folder = Path()
        self._look = Look()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage: of the last validation, and, for the writer's thread, of all so far."""
        counted = [session.stages.seconds for session in self._sessions.values()][-1:]
        written = self._gallery.seconds if self._gallery is not None else {}
        return {name: value for part in (*counted, written) for name, value in part.items()}

    def finish_writing(self) -> None:
        """Waits until all pictures so far are written; nobody has to."""
        if self._gallery is not None:
            self._note_late(self._gallery.finish())

    # ---- what is kept in a checkpoint ------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells apart two of these on one Trainer."""
        layers = [self.layers] if isinstance(self.layers, str | nn.Module) else self.layers
        names = layers and [x if isinstance(x, str) else type(x).__name__ for x in layers]
        return self._generate_state_key(
            tag=self.tag,
            layers=names,
            channels=self.channels,
            module=self.module,
            input_key=self.input_key,
            every=self.every_n_train_steps or self.every_n_epochs,
            log=sorted(self.figures),
        )

    def state_dict(self) -> dict[str, Any]:
        """The run's choices (layers, channels, which images are the probe) and what figure 4 shows."""
        session = self._sessions.get("val")
        if session is None or session.watch.probe is None:
            return dict(self._kept)
        return {
            "layers": list(session.watch.layers),
            "module": session.watch.entry,
            "channels": self.channels,
            "probe": {batch: list(rows) for batch, rows in session.watch.rows.items()},
            "epoch": self._drawn_epoch,
            "step": self._drawn_step,
            "history": self._history.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the choices of the run that is continued."""
        self._kept = dict(state_dict)
        self._drawn_epoch = state_dict.get("epoch")
        self._drawn_step = state_dict.get("step")
        self._history.load(state_dict.get("history", {}))

    def __getstate__(self) -> dict[str, Any]:
        """What is sent to other processes or copied: choices, no hooks, threads or images."""
        gone: dict[str, Any] = {"_sessions": {}, "_gallery": None, "_order": Order()}
        return self.__dict__ | gone | {"_kept": self.state_dict()}

    # ---- begin and end ---------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks what can be checked before the first step."""
        if stage not in _STAGES:
            return
        if _SHARDED & {base.__name__ for base in type(trainer.strategy).__mro__}:
            raise MisconfigurationException(
                f"DeconvCallback does not work with {type(trainer.strategy).__name__}, which "
                "shards the weights: no process can run the model alone. Use DDP or one device, "
                "or draw from the checkpoint afterwards with the command lit-deconv attribute"
            )
        try:
            self._chosen = resolve(pl_module, self.layers)
            entries = list(resolve(pl_module, self.module))
        except (ValueError, TypeError) as error:
            raise MisconfigurationException(f"DeconvCallback: {error}") from error
        if entries not in ([], [self.module]):
            raise MisconfigurationException(
                f"DeconvCallback(module={self.module!r}): matches {', '.join(entries)}; expected "
                "the name of one module"
            )
        if any(session.model is not pl_module for session in self._sessions.values()):
            self._sessions = {}
            self._history.load({})
        self._look = self._look_for(trainer)
        self._seen = False
        self._failures.renew()
        if stage == "fit":
            self._drawn_epoch = self._drawn_step = None
        # asked by every process, for it is a broadcast
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Takes off what is on and finishes the last write."""
        if stage not in _STAGES:
            return
        self._close()
        if stage != "fit" and not self._seen:
            self._failures.add(EVERY_LAYER, ValueError(_empty(stage)))
        self._failures.report()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Takes off what is on and finishes the last write; the exception stays as it is."""
        self._close()
        self._failures.forget()

    # ---- validation and test ---------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decides whether this validation is drawn."""
        if not trainer.sanity_checking:
            self._begin(trainer, pl_module, "val", trainer.num_val_batches)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Puts the hooks on."""
        if session := self._session(trainer, "val"):
            session.before(batch_idx, dataloader_idx, self._order.given(batch, dataloader_idx))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the hooks off; after the last batch, draws."""
        if session := self._session(trainer, "val"):
            session.after(pl_module.validation_step, batch, batch_idx, dataloader_idx)
            fitting = trainer.state.fn == "fit"
            loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
            # weight averaging may have swapped the weights by the end of the epoch
            if loop.batch_progress.is_last_batch:
                session.draw(_moment(trainer))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the numbers."""
        self._end(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins, as in validation."""
        self._begin(trainer, pl_module, "test", trainer.num_test_batches)

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Puts the hooks on."""
        if session := self._session(trainer, "test"):
            session.before(batch_idx, dataloader_idx, self._order.given(batch, dataloader_idx))

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Takes the hooks off; after the last batch, draws."""
        if session := self._session(trainer, "test"):
            session.after(pl_module.test_step, batch, batch_idx, dataloader_idx)
            if trainer.test_loop.batch_progress.is_last_batch:
                session.draw(_moment(trainer))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the numbers."""
        self._end(trainer, pl_module, "test")

    # ---- training, where there is no validation --------------------------------------------------

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins, where no validation will."""
        if not trainer.enable_validation:
            self._begin(trainer, pl_module, "train", [1])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Puts the hooks on while probe images are missing."""
        session = self._session(trainer, "train")
        if session and not session.watch.is_complete:
            session.before(batch_idx)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Takes the hooks off."""
        session = self._session(trainer, "train")
        if session and not session.watch.is_complete:
            if session.watch.compiled and not pl_module.automatic_optimization:
                self._failures.add(EVERY_LAYER, NotImplementedError(_MANUAL))
                self._due = False
                self._failures.report()
                return
            session.after(pl_module.training_step, batch, batch_idx)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws, where there was no validation to draw after."""
        if not trainer.enable_validation:
            self._end(trainer, pl_module, "train")
        elif trainer.num_val_batches and not sum(trainer.num_val_batches):
            self._failures.add(EVERY_LAYER, ValueError(_empty("validation")))
            self._failures.report()

    # ---- one validation --------------------------------------------------------------------------

    def _begin(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        key: str,
        batches: Sequence[float],
    ) -> None:
        self._due = trainer.state.fn != "fit" or self._is_due(trainer)
        if self._due:
            with self._failures.noted(EVERY_LAYER):
                if key not in self._sessions:
                    self._sessions[key] = self._new_session(trainer, pl_module, key)
                self._sessions[key].begin(batches[0] if batches else 0)
                loaders = {"val": trainer.val_dataloaders, "test": trainer.test_dataloaders}
                self._order = Order(loaders.get(key))

    def _session(self, trainer: pl.Trainer, key: str) -> Session | None:
        if not self._due or trainer.sanity_checking:
            return None
        self._seen = True
        return self._sessions.get(key)

    def _end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, key: str) -> None:
        if not self._due or trainer.sanity_checking:
            return
        self._due = False
        session = self._sessions.get(key)
        if session is None:
            # it could not even begin; the others are not to wait for it
            Peers(trainer.global_rank, trainer.world_size).all(None)
        elif not session.drawn:
            session.draw(_moment(trainer))
        if trainer.state.fn == "fit":
            self._drawn_epoch, self._drawn_step = trainer.current_epoch, trainer.global_step
        if self._gallery is not None and self.on_error == "raise":
            self._note_late(self._gallery.finish())
        scalars = session.scalars if session is not None else {}
        text = self._failures.text()
        said = Peers(trainer.global_rank, trainer.world_size).all((scalars, text))
        scalars, text = said[0][0], "; ".join(dict.fromkeys(each for _, each in said if each))
        self._failures.report(text)
        # not through the module's log: what a compiled step logs is part of its graphs' guards
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in scalars.items()})
        for logger in trainer.loggers if scalars else ():
            logger.log_metrics(scalars, step=_moment(trainer).step)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if self.every_n_train_steps is not None:
            before = self._drawn_step
            return before is None or trainer.global_step - before >= self.every_n_train_steps
        epoch, last = trainer.current_epoch, self._drawn_epoch
        return last is None or epoch <= last or epoch - last >= self.every_n_epochs

    def _new_session(self, trainer: pl.Trainer, pl_module: pl.LightningModule, key: str) -> Session:
        kept = self._kept if key == "val" else {}
        layers, entry = self._chosen, self.module
        known = named_layers(pl_module)
        if not layers and all(name in known for name in kept.get("layers", ())):
            layers = {name: known[name] for name in kept.get("layers", ())}
        own = self.probe if isinstance(self.probe, Tensor) else None
        size = 1 if isinstance(self.probe, Tensor) else self.probe
        sees = key != "train" and not is_compiled(pl_module)
        peers = Peers(trainer.global_rank, trainer.world_size)
        examples = self.compare_images if "strongest_beside_captum" in self.figures else 0
        examples = examples if self.compare else 0
        ranking = Ranking(self.channels, self.top_k, self.max_bytes, examples)
        wanted = Wanted(self.figures, self.compare, self.compare_images, size)
        if not sees:
            size = max(size, self.unhooked_images)
        watch = Watch(
            pl_module, layers, entry, self.input_key, size, ranking, kept.get("probe"), sees, peers
        )
        source = {"val": "validation", "test": "test", "train": "training"}[key]
        tag = self._tag_among(trainer) + ("_test" if key == "test" else "")
        return Session(
            pl_module,
            watch,
            own,
            source,
            wanted,
            tag,
            self._history,
            self._failures,
            lambda: self._open(trainer),
            peers,
        )

    def _tag_among(self, trainer: pl.Trainer) -> str:
        every = [c for c in trainer.callbacks if isinstance(c, DeconvCallback)]  # type: ignore[attr-defined]
        asked = {callback.tag for callback in every}
        given: set[str] = set()
        for callback in every:
            tag, number = callback.tag, 1
            while tag in given or (number > 1 and tag in asked):
                number += 1
                tag = f"{callback.tag}_{number}"
            if callback is self:
                return tag
            given.add(tag)
        return self.tag

    # ---- pictures --------------------------------------------------------------------------------

    def _open(self, trainer: pl.Trainer) -> Gallery:
        if self._gallery is None:
            self._gallery = Gallery(trainer.loggers, self._folder, self._look)
            # a dry run has no logger and is to leave no file
            if self._gallery.message and self._gallery.message != self._said:
                self._said = self._gallery.message
                rank_zero_info(self._said)
        return self._gallery

    def _close(self) -> None:
        for session in self._sessions.values():
            session.watch.detach()
        if self._gallery is not None:
            self._note_late(self._gallery.close())
            self._gallery = None

    def _note_late(self, late: Sequence[Any]) -> None:
        for failure in late:
            self._failures.add(failure.tag, failure.error)

    def _look_for(self, trainer: pl.Trainer) -> Look:
        norm = self.norm
        source = getattr(trainer, "datamodule", None)
        if norm is None and source is not None:
            norm = checked_norm(getattr(source, "mean", None), getattr(source, "std", None))
        mean, std = norm or (None, None)
        return Look(mean, std, input_channels=self.show_channels)


def _moment(trainer: pl.Trainer) -> Moment:
    # the step that Lightning gives its own scalars; global_step counts optimizer steps
    step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
    averages = any(
        base.__name__ == "WeightAveraging"
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for base in type(callback).__mro__
    )
    fitting = trainer.state.fn == "fit"
    # they are put in the model's place for the time of a validation, in fit alone
    which = "averaged" if trainer.validating else "as trained, not averaged"
    note = f"Weights: {which}." if averages and fitting else ""
    return Moment(trainer.current_epoch, step, note, fitting)


def _empty(stage: str) -> str:
    return (
        f"the {stage} loader gave no batch, so there was nothing to look at; check its length, "
        "drop_last and the limit_..._batches arguments of the Trainer"
    )

"""A model's forward pass up to chosen layers, recorded by the path that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from lit_deconv.engine.autograd import record_autograd
from lit_deconv.engine.errors import ChannelsError, DeconvError, LayerError, UnsupportedOp
from lit_deconv.engine.local import Local, Manner, Ways
from lit_deconv.engine.recorder import only_tensor, record
from lit_deconv.engine.recording import ByAutograd, OnTape, Recorded, Recording
from lit_deconv.engine.tape import Options, Tape
from lit_deconv.engine.walk import refusals

Path = Literal["auto", "rules", "autograd"]

# Bytes of images that are recorded together whatever the model makes of them.
_SMALL = 1 << 18


class Forward:
    """What ``Deconvnet`` records. Eval mode and the like are the caller's.

    Args:
        model: The model.
        layers: Layers by name.
        path: See ``Deconvnet``, as for the rest.
        call: Which call of a layer.
        options: Choices about gates and overlaps.
        output: Which of a layer's outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        path: Path,
        call: int | None,
        options: Options,
        output: int | str | None,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.path = path
        self.call = call
        self.options = options
        self.output = output
        self._called_once = False
        self._may_round = True
        self._kind_taken: tuple[Any, ...] = ()
        self._ways = Ways(model)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was found out: it names PyTorch's functions, which cannot be pickled."""
        return {**vars(self), "_kind_taken": (), "_ways": Ways(self.model)}

    def recorded(
        self,
        images: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        manner: Manner | None = None,
    ) -> Recording:
        """Records all images in one run of the model.

        Args:
            images: The inputs, each [N, ...].
            extra: Further arguments of the model.
            manner: How the model takes them, where that is known; its ``runs`` are the caller's.

        Raises:
            UnsupportedOp: The path that was asked for cannot be had.
        """
        if self.path == "autograd":
            return self._by_autograd(images, extra)
        if manner is not None and self._may_round:
            known = self._known(images, extra, manner)
            if known is not None:
                return OnTape(known, images)
        tape = self.tape(images, extra)
        if manner is not None and manner.holds(tape):
            return OnTape(tape, images)
        if self.path == "rules" and tape.faults:
            raise UnsupportedOp(f"{tape.faults[0]}; use path='autograd' or 'auto'")
        if self.path == "rules" or self._rules_take(tape):
            return OnTape(tape, images)
        return self._by_autograd(images, extra)

    def _rules_take(self, tape: Tape) -> bool:
        """Whether rules have a way from the layers to the images, which is looked at once a kind of tape."""
        kind = tape.kind()
        if kind != self._kind_taken:
            if any(refusals(tape, tape.layers[name]) for name in self.layers):
                return False
            self._kind_taken = kind
        return True

    def _known(
        self, images: tuple[Tensor, ...], extra: tuple[Any, ...], manner: Manner
    ) -> Tape | None:
        """Records what may be rounded; None if the model does not take it as its few images have shown.

        It may do something else for many images, or look at how its maps lie in memory (``contiguous()``
        behind the last pool does). Then it is not tried again.
        """
        try:
            tape = self.tape(images, extra, manner.exact)
        except Exception:
            # A model may raise anything where a map lies otherwise than it expects, such as from an
            # assertion. What has another cause is not lost: it comes up again in the exact run.
            self._may_round = False
            return None
        self._may_round = manner.holds(tape)
        return tape if self._may_round else None

    def recorded_apart(
        self, images: tuple[Tensor, ...], extra: tuple[Any, ...], to_join: bool = False
    ) -> Iterator[Recorded]:
        """Records the images in as many runs as suit the cache, where none matters to the others.

        Args:
            images: The inputs, each [N, ...].
            extra: Further arguments of the model.
            to_join: Whether the recordings are to be joined again.

        Yields:
            Which images, these images, and their recording.
        """
        manner = self._manner(images, extra, to_join)
        start = 0
        runs = manner.runs if manner else 1
        for some in zip(*(image.tensor_split(runs) for image in images), strict=True):
            recording = self.recorded(some, extra, manner)
            yield slice(start, start + len(some[0])), some, recording
            start += len(some[0])

    def _manner(
        self, images: tuple[Tensor, ...], extra: tuple[Any, ...], to_join: bool
    ) -> Manner | None:
        few = len(images[0]) < 4 or images[0].nbytes < _SMALL
        if few or not self.few_may_show_all(images, extra):
            return None
        return self._ways.manner(images[0], self._read, to_join)

    def few_may_show_all(self, images: tuple[Tensor, ...], extra: tuple[Any, ...]) -> bool:
        """Whether what ``ways`` reads off a few images can hold for all of them."""
        return self.path != "autograd" and len(images) == 1 and not extra

    def ways(self, images: Tensor) -> dict[str, Local]:
        """The layers' ways through the model; none where a few images do not stand for many.

        Args:
            images: [N, C, *map].
        """
        return self._ways.of(images, self._read)

    def _read(self, few: Tensor) -> Tape:
        return self.tape((few,), ())

    def tape(
        self, images: tuple[Tensor, ...], extra: tuple[Any, ...], exact: int | None = None
    ) -> Tape:
        """Records for the rules' walk, whatever the path; ``exact`` as for ``record``."""
        tape = record(
            partial(self._run, extra),
            images,
            self.layers,
            model=self.model,
            call=self.call,
            options=self.options,
            stop_early=self._stop_early,
            choose=self.feature_map,
            exact=exact,
        )
        self._note_calls(tape.calls)
        return tape

    def _run(self, extra: tuple[Any, ...], *tensors: Tensor) -> Any:
        """The model, its complaint about the number of channels with the way out."""
        try:
            return self.model(*tensors, *extra)
        except RuntimeError as error:
            if isinstance(error, DeconvError) or "channels, but got" not in str(error):
                raise
            raise ChannelsError(
                f"the model takes no input of shape {list(tensors[0].shape)}: {error}; give images with "
                f"the channels that it was made for, such as images.expand(-1, 3, -1, -1) for grey ones"
            ) from error

    def _by_autograd(self, images: tuple[Tensor, ...], extra: tuple[Any, ...]) -> ByAutograd:
        if self.options.overlap == "place":
            raise UnsupportedOp(
                "overlap='place' is offered by the rules' walk alone, and this model needs autograd; "
                "use overlap='add'"
            )
        recording = record_autograd(
            partial(self._run, extra),
            images,
            self.layers,
            model=self.model,
            call=self.call,
            gates=self.options.gates,
            stop_early=self._stop_early,
            choose=self.feature_map,
        )
        self._note_calls(recording.calls)
        return ByAutograd(recording)

    @property
    def _stop_early(self) -> bool:
        return self._called_once or self.call is not None

    def _note_calls(self, calls: Mapping[str, int]) -> None:
        for name, count in calls.items():
            if count > 1 and self.call is None:
                raise LayerError(
                    f"layer {name!r} runs {count} times in one forward pass; choose a layer that "
                    f"runs once, such as the module around it, or say in Python which call is "
                    f"meant: Deconvnet(..., call=0) is the first, call=-1 the last"
                )
        self._called_once = True

    def feature_map(self, layer: str, output: Any) -> Tensor:
        """What is meant of what a layer returned, see ``Deconvnet``."""
        if self.output is None:
            return only_tensor(layer, output)
        try:
            by_name = isinstance(self.output, str) and not isinstance(output, Mapping)
            chosen = getattr(output, str(self.output)) if by_name else output[self.output]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise LayerError(
                f"layer {layer!r} returned a {type(output).__name__} without an item {self.output!r}"
            ) from error
        return only_tensor(layer, chosen)

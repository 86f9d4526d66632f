"""Zeiler-Fergus reconstructions in Captum's style: what in the image activates a layer, in pixels."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lit_deconv.engine.errors import LayerError, SelectorError, UnsupportedOp
from lit_deconv.engine.geometry import receptive_field
from lit_deconv.engine.joining import joined, joined_for_layers
from lit_deconv.engine.local import Layout
from lit_deconv.engine.recording import Recorded
from lit_deconv.engine.rules.shared_work import shared_work
from lit_deconv.engine.tape import Options
from lit_deconv.engine.undisturbed import undisturbed
from lit_deconv.engine.units import (
    empty,
    patched_units,
    samples_of,
    units_of_patches,
    walked_maps,
    walked_units,
    with_boxes,
    with_units,
)
from lit_deconv.engine.walk import pixels
from lit_deconv.explain import explained
from lit_deconv.forward import Forward, Path
from lit_deconv.layers import resolve, unwrapped
from lit_deconv.selectors import Selector, checked_channels, checked_inputs, checked_units, seed_of

Inputs: TypeAlias = "Tensor | tuple[Tensor, ...]"

# Modules whose frames lie between a caller and a warning.
_INSIDE = (__name__, "lit_deconv.engine.")


class Deconvnet:
    """Projects activations of a layer back to the pixels (Zeiler & Fergus, 2014, section 2.1).

    The chosen activations are kept, the rest of the layer is zero; then, op by op: unpool to the
    switches of this forward pass, rectify the signal, convolve with the transposed filters. Two
    layers share one forward, which stops behind the deepest of them.

    The seed is the raw activation with its sign. A negative one (of a layer without a rectifier)
    sends the negative of its filter back; from the first rectifier on what is negative of that is
    gone, so R(-v) is not -R(v).

    The model runs in eval mode and is left as it was: train flags, buffers, gradients, random
    numbers and hooks, also after an error. It may be called under ``no_grad`` and ``inference_mode``.
    Where its ops, of two images and of three, show that no image matters to another, many large images
    go through it a few at a time, as they fit the cache; ``via="images"``, a callable selector and
    further arguments of the model keep them together.

    A forward ends behind the deepest of the layers; the first one goes to the model's end, to see how
    often each layer runs.

    Args:
        model: Any model that maps images to something through feature maps.
        layer: A module of the model, its dotted name, or a sequence of these; globs are names too.
            With a sequence (or a glob) results are dicts by name.
        path: "rules" walks the recorded ops back, "autograd" lets autograd do it with rectified
            gradients, "auto" takes rules and falls back to autograd where an op has none.
        call: Which call of the layer is meant (0 the first, -1 the last) when the model runs it more
            than once in one forward.
        gates: "constant" keeps the gate of a product of two activations as a constant, "gradient"
            follows the product rule, and the statistics of a normalisation too.
        overlap: "add" is the adjoint where pooling windows share a switch; "place" overwrites, as
            ``max_unpool2d`` does (rules only).
        output: Index or key of the feature map in a layer's output that holds several tensors.
        autocast: Record under the caller's autocast instead of in the weights' own precision.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | Sequence[str | nn.Module],
        *,
        path: Path = "auto",
        call: int | None = None,
        gates: Literal["constant", "gradient"] = "constant",
        overlap: Literal["add", "place"] = "add",
        output: int | str | None = None,
        autocast: bool = False,
    ) -> None:
        for name, value, allowed in (
            ("path", path, ("auto", "rules", "autograd")),
            ("gates", gates, ("constant", "gradient")),
            ("overlap", overlap, ("add", "place")),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}"
                )
        if call is not None and call < -1:
            raise ValueError(f"call={call}: expected 0 for the first, 1, ..., or -1 for the last")
        self.model = unwrapped(model)
        _refuse_scripted(self.model)
        self.layers = resolve(self.model, layer)
        self.several = len(self.layers) != 1 or not isinstance(layer, (str, nn.Module))
        self.path: Path = path
        self.autocast = autocast
        options = Options(gates, overlap)
        self._forward = Forward(self.model, self.layers, path, call, options, output)

    # ---- what users call -----------------------------------------------------------------

    def attribute(
        self,
        inputs: Inputs,
        neuron_selector: Selector = None,
        additional_forward_args: Any = None,
    ) -> Any:
        """Reconstructs a whole layer, some of it, or one unit in each image.

        Args:
            inputs: Images [N, C, H, W] (any number of spatial dimensions), or a tuple of tensors.
            neuron_selector: What of the layer is kept. None: all of it, X' = C^T Y. An int: one
                feature map. A tuple of ints and slices: an index behind the images, such as
                (channel, row, column). A callable takes the layer's output and returns one scalar an
                image; the seed is that scalar times the callable's gradient.
            additional_forward_args: Handed to the model behind the inputs, not followed.

        Returns:
            A tensor like each of ``inputs`` (a tuple for a tuple); by layer name for several layers.

        Raises:
            SelectorError: The selector lies outside the layer's output.
            LayerError: The layer did not run, ran more than once, or does not depend on the input.
            UnsupportedOp: With path="rules", an op on the way has no rule.
            AmbiguousProduct: A product of two activations, neither or both of them gates.
        """
        images, extra = checked_inputs(inputs), _as_tuple(additional_forward_args)
        parts: dict[str, list[list[Tensor]]] = {name: [] for name in self.layers}
        with self._undisturbed(whole_maps=True):
            # A callable is shown the whole layer's output.
            recorded = self._recorded(images, extra, not callable(neuron_selector))
            for _, some, recording in joined_for_layers(recorded, images):
                for name in self.layers:
                    seed = seed_of(name, recording.activations[name], neuron_selector)
                    found = recording.walk(name, seed)
                    parts[name].append(
                        [pixels(s, i, len(i)) for s, i in zip(found, some, strict=True)]
                    )
            results = {
                name: _like(inputs, [_joined(run) for run in zip(*found, strict=True)])
                for name, found in parts.items()
            }
        return results if self.several else next(iter(results.values()))

    def maps(
        self, inputs: Inputs, channels: Tensor | Sequence[int], additional_forward_args: Any = None
    ) -> Any:
        """Reconstructs several feature maps, each alone with all its positions, from one forward.

        Args:
            inputs: Images [N, C, H, W], or a tuple of tensors.
            channels: Which maps, int64 [M].
            additional_forward_args: Handed to the model behind the inputs, not followed.

        Returns:
            [M, N, C, H, W] for each input; ``maps(x, [3, 5])[1]`` is ``attribute(x, 5)``.

        Raises:
            SelectorError: The layer has no such map.
        """
        images, extra = checked_inputs(inputs), _as_tuple(additional_forward_args)
        found: dict[str, list[Tensor]] = {}
        with self._undisturbed(whole_maps=True):
            for where, some, recording in self._recorded(images, extra):
                for name in self.layers:
                    chosen = checked_channels(name, channels, recording.activations[name])
                    if name not in found:
                        found[name] = [i.new_empty(len(chosen), *i.shape) for i in images]
                    own = [result[:, where] for result in found[name]]
                    walked_maps(recording, name, chosen, some, own)
        results = {name: _like(inputs, found[name]) for name in self.layers}
        return results if self.several else next(iter(results.values()))

    def reconstruct(
        self,
        inputs: Inputs,
        units: Tensor | Mapping[str, Tensor],
        crop: bool = False,
        additional_forward_args: Any = None,
        via: Literal["auto", "images", "patches"] = "auto",
    ) -> Any:
        """Reconstructs single units, each alone: the rest of its layer is zero.

        Args:
            inputs: Images [N, C, H, W], or a tuple of tensors.
            units: int64 [U, 4] of (sample, channel, row, column), or [U, 2 + D] for a layer with D
                spatial dimensions; a dict of these by layer name for several layers.
            crop: Return only each unit's receptive field.
            additional_forward_args: Handed to the model behind the inputs, not followed.
            via: "images" records the whole images once, "patches" runs each unit's receptive field
                alone, forward and back; "auto" takes what needs fewer operations. The layers' way
                through the model is read once per image size and kept for further calls, as long as
                the model has the same parts, flags, hooks and attributes; a forward that depends on
                anything outside the model, such as a global, or does something else from some number
                of images on, more than three, needs via="images".

        Returns:
            [U, C, H, W] in the order of ``units``; with ``crop`` a pair of patches [U, C, h, w] and
            boxes int64 [U, 4] (top, left, bottom, right; half-open). A box may reach past the image;
            there the patch is 0. In a dimension where the field exceeds the image, the box is the
            whole dimension. A dict by name for several layers, a tuple for a tuple of inputs.

        Raises:
            SelectorError: A unit lies outside the layer's output.
        """
        images = checked_inputs(inputs)
        chosen = units if isinstance(units, Mapping) else dict.fromkeys(self.layers, units)
        if set(chosen) != set(self.layers):
            raise SelectorError(
                f"units were given for {sorted(chosen)}, expected one tensor for each of "
                f"{sorted(self.layers)}"
            )
        extra = _as_tuple(additional_forward_args)
        with self._undisturbed():
            found = self._by_patches(images, extra, chosen, crop, via)
            rest = {name: units for name, units in chosen.items() if name not in found}
            if rest:
                apart = via != "images"
                if apart:
                    images, rest = self._with_units(images, extra, rest)
                found |= self._by_images(images, extra, rest, crop, apart)
        results = {name: _like(inputs, found[name]) for name in self.layers}
        return results if self.several else next(iter(results.values()))

    def reconstruct_patches(
        self,
        patches: Tensor,
        units: Tensor,
        image: Sequence[int],
        layer: str | None = None,
        via: Literal["auto", "images"] = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Reconstructs units of images of which only the patches under the units are left.

        Args:
            patches: [P, C, h, w], cut by the boxes of ``layouts`` and 0 outside the image; whole
                images where the layout ``takes_image``.
            units: int64 [U, 2 + D]: row of ``patches``, channel, position in the layer.
            image: Channels and extents of an image.
            layer: Which layer, where there are several.
            via: "images" runs whole images as they are, "auto" takes what needs fewer operations.

        Returns:
            The units' activations [U], computed anew, and their patches [U, C, h, w], as
            ``reconstruct`` gives them with ``crop``.

        Raises:
            UnsupportedOp: The layer needs the whole image and ``patches`` are smaller.
        """
        name = layer if layer is not None else next(iter(self.layers))
        size = torch.Size(image)
        with self._undisturbed():
            local = self._forward.ways(patches.new_zeros(1, *size))[name]
            whole = patches.shape[1:] == size
            by_patches = local.plan is not None and self.path != "autograd" and via != "images"
            if not whole and not by_patches:
                raise UnsupportedOp(
                    f"layer {name!r} cannot be computed on patches of {list(patches.shape[2:])}: "
                    f"{local.why or 'it was asked for whole images'}; give whole images"
                )
            chosen = checked_units(
                name, units, torch.Size([len(patches), *local.shape]), patches.device
            )
            if by_patches and (not whole or local.cheaper(len(chosen), len(patches))):
                return units_of_patches(local, patches, chosen, size)
            recording = self._forward.recorded((patches,), ())
            found = empty(patches, recording.receptive_field(name), chosen, True)
            rows = torch.arange(len(chosen), device=chosen.device)
            walked_units(recording, name, chosen, (patches,), True, rows, [found])
            return recording.activations[name][chosen.unbind(1)], found

    def layouts(self, image: Tensor) -> dict[str, Layout]:
        """By layer, what its feature maps and receptive fields are for images of one size.

        Args:
            image: [1, C, H, W]; only its size, dtype and device matter.
        """
        with self._undisturbed():
            blank = torch.zeros_like(image[:1])
            recording, local = self._forward.recorded((blank,), ()), self._forward.ways(blank)
            found = {}
            for name in self.layers:
                shape = recording.activations[name].shape
                if len(shape) < 3:
                    raise LayerError(
                        f"layer {name!r} gives {list(shape[1:])} for one image, expected feature "
                        f"maps [C, H, W]; choose a layer in front of the flattening"
                    )
                is_local = local[name].plan is not None and self.path != "autograd"
                field = local[name].field if is_local else recording.receptive_field(name)
                found[name] = Layout(
                    shape[1], tuple(shape[2:]), field, tuple(blank.shape[1:]), is_local
                )
        return found

    def activations(self, inputs: Inputs, additional_forward_args: Any = None) -> Any:
        """The layer's output [N, C, *map], the model's own to the bit.

        A reconstruction of several images may on a CPU start from one that is rounded otherwise (by
        about 1e-6 of the largest value), but its switches are those of this one.
        """
        images, extra = checked_inputs(inputs), _as_tuple(additional_forward_args)
        with self._undisturbed():
            found = dict(self._forward.recorded(images, extra).activations)
        return found if self.several else next(iter(found.values()))

    def receptive_field(self, inputs: Inputs, additional_forward_args: Any = None) -> Any:
        """Which pixels each unit of the layer can see, a ``ReceptiveField``."""
        with self._undisturbed():
            tape = self._forward.tape(checked_inputs(inputs), _as_tuple(additional_forward_args))
            fields = {name: receptive_field(tape, tape.layers[name]) for name in self.layers}
        return fields if self.several else next(iter(fields.values()))

    def explain(self, inputs: Inputs, additional_forward_args: Any = None) -> Any:
        """Which path is taken, op by op and why, and where Captum's Deconvolution is wrong.

        Returns:
            An ``Explanation``; by layer name for several layers.
        """
        with self._undisturbed():
            tape = self._forward.tape(checked_inputs(inputs), _as_tuple(additional_forward_args))
            found = {name: explained(tape, tape.layers[name], self.path) for name in self.layers}
        return found if self.several else next(iter(found.values()))

    def feature_map(self, layer: str, output: Any) -> Tensor:
        """What is meant of what a layer returned, see ``output``."""
        return self._forward.feature_map(layer, output)

    # ---- how -----------------------------------------------------------------------------

    @contextmanager
    def _undisturbed(self, whole_maps: bool = False) -> Iterator[None]:
        alone = undisturbed(self.model, autocast=self.autocast)
        with alone, torch.no_grad(), shared_work(whole_maps):
            yield

    def _recorded(
        self,
        images: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        apart: bool = True,
        to_join: bool = False,
    ) -> Iterator[Recorded]:
        """Recordings of the images, of some at a time where they may be taken ``apart``.

        Of fewer at a time where they are to be joined again.
        """
        recordings = (
            self._forward.recorded_apart(images, extra, to_join)
            if apart
            else [(slice(0, len(images[0])), images, self._forward.recorded(images, extra))]
        )
        told: set[str] = set()
        for where, some, recording in recordings:
            for name in self.layers:
                if name not in told and _reported_not_finite(name, recording.activations[name]):
                    told.add(name)
            yield where, some, recording

    def _by_patches(
        self,
        images: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        units: Mapping[str, Tensor],
        crop: bool,
        via: str,
    ) -> dict[str, list[Any]]:
        """The layers whose units are cheaper computed from patches than from whole images."""
        if via not in ("auto", "images", "patches"):
            raise ValueError(f"via={via!r}: expected 'auto', 'images' or 'patches'")
        if via == "images" or not self._forward.few_may_show_all(images, extra):
            if via == "patches":
                raise UnsupportedOp(
                    "patches need one input, no further arguments and the rules' path"
                )
            return {}
        found = {}
        for name, local in self._forward.ways(images[0]).items():
            if local.plan is None:
                if via == "patches":
                    raise UnsupportedOp(
                        f"layer {name!r} cannot be computed on patches: {local.why}"
                    )
                continue
            shape = torch.Size([len(images[0]), *local.shape])
            chosen = checked_units(name, units[name], shape, images[0].device)
            pays = local.cheaper(len(chosen), 1)  # and more so where they are of more images
            pays = pays or local.cheaper(len(chosen), len(samples_of([chosen], len(images[0]))))
            if via == "patches" or pays:
                found[name] = patched_units(local, images[0], chosen, crop)
                _reported_not_finite(name, found[name][0][0] if crop else found[name][0])
        return found

    def _with_units(
        self, images: tuple[Tensor, ...], extra: tuple[Any, ...], units: dict[str, Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Those images alone that have a unit, where no image matters to another; the units on these."""
        if not self._forward.few_may_show_all(images, extra):
            return images, units
        ways = self._forward.ways(images[0])
        if not all(name in ways and ways[name].plan is not None for name in units):
            return images, units
        checked = {
            name: checked_units(
                name, some, torch.Size([len(images[0]), *ways[name].shape]), images[0].device
            )
            for name, some in units.items()
        }
        return with_units(images, checked)

    def _by_images(
        self,
        images: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        units: Mapping[str, Tensor],
        crop: bool,
        apart: bool,
    ) -> dict[str, list[Any]]:
        """Layers whose units are walked back over recordings of whole images."""
        chosen: dict[str, Tensor] = {}
        found: dict[str, list[Tensor]] = {}
        fields = {}
        recorded = self._recorded(images, extra, apart, to_join=True)
        for where, some, recording in joined(recorded, images):
            for name in units:
                if name not in found:
                    shape = list(recording.activations[name].shape)
                    shape[0] += len(images[0]) - len(some[0])  # as of all images
                    device = images[0].device
                    chosen[name] = checked_units(name, units[name], torch.Size(shape), device)
                    fields[name] = recording.receptive_field(name)
                    found[name] = [empty(i, fields[name], chosen[name], crop) for i in images]
                own, rows = chosen[name], torch.arange(len(chosen[name]), device=device)
                if len(some[0]) < len(images[0]):
                    inside = (own[:, 0] >= where.start) & (own[:, 0] < where.stop)
                    rows = rows[inside]
                    own = own[inside]
                    own[:, 0] -= where.start
                walked_units(recording, name, own, some, crop, rows, found[name])
        return {
            name: [with_boxes(result, fields[name], chosen[name], crop) for result in results]
            for name, results in found.items()
        }


# ---- arguments -------------------------------------------------------------------------------


def _as_tuple(extra: Any) -> tuple[Any, ...]:
    if extra is None:
        return ()
    return extra if isinstance(extra, tuple) else (extra,)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _like(inputs: Inputs, found: Sequence[Any]) -> Any:
    return tuple(found) if isinstance(inputs, tuple) else found[0]


def _reported_not_finite(layer: str, values: Tensor) -> bool:
    """What is not finite is passed on as it is, and said to whoever called this file.

    Between whom and here may lie the engine, which asks for one recording after the other.
    """
    # A sum is one pass; where it overflows though no value does, all of them are looked at.
    if bool(values.sum().isfinite()) or bool(values.isfinite().all()):
        return False
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals["__name__"].startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"activations of layer {layer!r} are not finite (NaN or infinite), and so are the pixels "
        f"they lead to; look at the images and the weights in front of it",
        stacklevel=level,
    )
    return True


def _refuse_scripted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise LayerError(
                f"{name or 'the model'} is a scripted or traced module, whose layers cannot be seen; "
                f"give the nn.Module that it was made from"
            )

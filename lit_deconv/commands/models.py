"""Loading the model that a command line names: a Lightning checkpoint, torchvision, or a function."""

from __future__ import annotations

import difflib
import inspect
import os
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from lit_deconv.layers import kind_of

SHOWN_KEYS = 4
"""So many missing and unexpected keys are named."""

_OF_LIGHTNING = {"state_dict", "pytorch-lightning_version"}


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and what its source says of its input.

    Args:
        model: The model.
        name: What figures call it.
        device: Where it is.
        note: What figures must say of it, such as that its weights are random.
        presets: What is known of its input: size, resize, interpolation, mean, std.
    """

    model: nn.Module
    name: str
    device: torch.device
    note: str = ""
    presets: Mapping[str, Any] = field(default_factory=dict)


def load(options: Namespace) -> Loaded:
    """Load what the options name.

    Args:
        options: Those of `options.add_model_arguments`.

    Raises:
        ValueError: No or two models, an unknown one, weights that do not fit, no such device.
        FileNotFoundError: No such checkpoint or state dict.
    """
    class_path = options["class"]
    if (options.model is None) == (options.checkpoint is None):
        given = "both" if options.model else "neither"
        raise ValueError(
            f"{given} of --model and --checkpoint given; name one model: --model resnet18, "
            "--model my_module:build, or --checkpoint FILE --class my_project.Net"
        )
    if (options.checkpoint is None) != (class_path is None):
        raise ValueError("--checkpoint FILE and --class my_project.Net belong together; give both")
    device = chosen_device(options.device)
    # random weights are the same each time, in each process and when a run goes on
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, name, note, presets = _built(options, class_path)
    if options.state_dict is not None:
        state = _state_dict(options.state_dict, options.unsafe_load)
        load_state(model, state, options.state_dict)
        note = ""
    return Loaded(model.to(device).eval(), name, device, note, presets)


def chosen_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: There is none such here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r}: expected auto, cpu, cuda or cuda:NUMBER") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: torch finds {count} GPUs here; use --device cpu")
    return device


def load_state(model: nn.Module, state: Mapping[str, Any], source: str) -> None:
    """Put weights into a model.

    Args:
        model: The model.
        state: Tensors by key.
        source: Where they come from, for messages.

    Raises:
        ValueError: They do not fit; the first keys that are missing, unexpected or of another shape.
    """
    expected = model.state_dict()
    strict = getattr(model, "strict_loading", True)
    missing = [key for key in expected if key not in state] if strict else []
    unexpected = [key for key in state if key not in expected] if strict else []
    reshaped = [
        f"{key} {list(state[key].shape)} for {list(value.shape)}"
        for key, value in expected.items()
        if hasattr(value, "shape") and key in state and state[key].shape != value.shape
    ]
    faults = [
        _some(words, keys)
        for words, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
        )
        if keys
    ]
    if faults:
        raise ValueError(_misfit(source, type(model).__name__, faults))
    model.load_state_dict(dict(state), strict=False)


def imported(path: str, separator: str, option: str) -> Any:
    """What a dotted path names; the current folder counts as a place to import from.

    Raises:
        ValueError: There is no such module, or nothing of that name in it.
    """
    module_name, _, name = path.rpartition(separator)
    if not module_name or not name:
        raise ValueError(f"{option} {path!r}: expected MODULE{separator}NAME")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{option} {path!r}: cannot import {module_name} ({error}); is it installed, or in the "
            "current folder?"
        ) from error
    if not hasattr(module, name):
        public = [each for each in vars(module) if not each.startswith("_")]
        raise ValueError(f"{option} {path!r}: {module_name} has no {name!r}{nearest(name, public)}")
    return getattr(module, name)


def takes_channels(model: nn.Module) -> int:
    """Input channels of the first convolution, 3 where there is none."""
    for module in model.modules():
        if kind_of(module) == "conv":
            return int(module.in_channels)  # type: ignore[arg-type]
    return 3


def nearest(name: str, known: list[str]) -> str:
    """The known names nearest to one, as the end of a sentence; empty where none is near."""
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def normalisation_of(source: object) -> dict[str, Any]:
    """The `mean` and `std` of a module, a data module or torchvision's transforms, if it has them."""
    mean, std = getattr(source, "mean", None), getattr(source, "std", None)
    if all(isinstance(each, (tuple, list, float)) for each in (mean, std)):
        return {"mean": mean, "std": std}
    return {}


def _built(
    options: Namespace, class_path: str | None
) -> tuple[nn.Module, str, str, dict[str, Any]]:
    if options.checkpoint is not None and class_path is not None:
        if options.weights or options.state_dict:
            raise ValueError(
                "--weights and --state-dict go with --model; a checkpoint holds its own"
            )
        return _from_checkpoint(options, class_path)
    if ":" in options.model:
        if options.weights:
            raise ValueError("--weights names torchvision's; give your own with --state-dict FILE")
        return *_from_function(options), {}
    return _from_torchvision(options)


def _from_checkpoint(
    options: Namespace, class_path: str
) -> tuple[nn.Module, str, str, dict[str, Any]]:
    path = options.checkpoint
    checkpoint = _loaded(path, options.unsafe_load)
    if not isinstance(checkpoint, Mapping) or _OF_LIGHTNING - set(checkpoint):
        raise ValueError(
            f"{path} is no Lightning checkpoint (it has no {' or no '.join(sorted(_OF_LIGHTNING))}); "
            "weights alone go with --model MODULE:FUNCTION --state-dict FILE"
        )
    cls = imported(class_path, ".", "--class")
    if not hasattr(cls, "load_from_checkpoint"):
        raise ValueError(
            f"--class {class_path!r} is no LightningModule; name the class that was trained"
        )
    hyperparameters = checkpoint.get("hyper_parameters") or {}
    # Lightning builds it from the hyperparameters; whether all keys fit is told by `load_state`.
    known = inspect.signature(cls.load_from_checkpoint).parameters
    safe = {"weights_only": not options.unsafe_load} if "weights_only" in known else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are")
        try:
            model = cls.load_from_checkpoint(
                path, map_location="cpu", strict=False, **safe, **options.model_args
            )
        except TypeError as error:
            raise ValueError(
                f"cannot build {class_path} from {path}: {error}; its __init__ did not save its "
                "arguments (save_hyperparameters), so give them with --model-args"
            ) from error
        except RuntimeError as error:
            reshaped = re.findall(r"size mismatch for ([^\s:]+)", str(error))
            if not reshaped:
                raise
            raise ValueError(
                _misfit(path, cls.__name__, [_some("of another shape", reshaped)])
            ) from error
    load_state(model, checkpoint["state_dict"], path)
    presets: dict[str, Any] = {}
    for source in (checkpoint.get("datamodule_hyper_parameters") or {}, hyperparameters):
        if isinstance(source.get("image_size"), int):
            presets["size"] = source["image_size"]
    presets.update(normalisation_of(model))
    return model, f"{cls.__name__} of {Path(path).name}", "", presets


def _from_function(options: Namespace) -> tuple[nn.Module, str, str]:
    function = imported(options.model, ":", "--model")
    if not callable(function):
        raise ValueError(f"--model {options.model!r} is no function that returns an nn.Module")
    try:
        model = function(**options.model_args)
    except TypeError as error:
        raise ValueError(
            f"cannot build {options.model}: {error}; its arguments go into --model-args"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"--model {options.model!r} returned {type(model).__name__}, expected an nn.Module"
        )
    return model, options.model, ""


def _from_torchvision(options: Namespace) -> tuple[nn.Module, str, str, dict[str, Any]]:
    from torchvision import models

    name = options.model
    known = models.list_models()
    if name.lower() not in known:
        raise ValueError(
            f"torchvision has no model {name!r}{nearest(name, known)} (a model of your own is "
            "MODULE:FUNCTION)"
        )
    enum = models.get_model_weights(name)
    weights = None
    if options.weights is not None:
        by_name = {**enum.__members__, "DEFAULT": enum.DEFAULT}
        if options.weights not in by_name:
            raise ValueError(
                f"{name} has no weights {options.weights!r}; it has: {', '.join(by_name)}"
            )
        weights = by_name[options.weights]
    arguments = dict(options.model_args)
    if (
        weights is None
        and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters
    ):
        arguments.setdefault("weights_backbone", None)  # a detector's would be downloaded unasked
    try:
        model = models.get_model(name, weights=weights, **arguments)
    except OSError as error:
        raise ValueError(
            f"could not download weights {options.weights or ''} of {name} ({error}); give a file of "
            "them with --state-dict, or leave --weights out for random ones"
        ) from error
    transforms = (weights or enum.DEFAULT).transforms()
    presets: dict[str, Any] = {}
    if hasattr(transforms, "crop_size"):
        presets = {
            "size": transforms.crop_size[0],
            "resize": transforms.resize_size[0],
            "interpolation": transforms.interpolation.value,
        }
    presets.update(normalisation_of(transforms))
    return model, name, "" if weights else "Random weights.", presets


def _state_dict(path: str, unsafe: bool) -> Mapping[str, Any]:
    state = _loaded(path, unsafe)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict")
    if state and all(key.startswith("module.") for key in state):  # as DataParallel saves it
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _loaded(path: str, unsafe: bool) -> Any:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=not unsafe)
    except pickle.UnpicklingError as error:
        if not unsafe and "GLOBAL " in str(error):
            raise ValueError(
                f"{path} holds more than tensors and plain values, which may run code when read; if "
                "you trust where it comes from, add --unsafe-load"
            ) from error
        raise ValueError(f"{path} is no file that torch.save wrote") from error
    except (RuntimeError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read, is it whole? ({error})") from error


def _misfit(source: str, model: str, faults: list[str]) -> str:
    return (
        f"{source} does not fit {model}: {'; '.join(faults)}. Is it the class, and are they the "
        "arguments (--model-args), of that training?"
    )


def _some(words: str, keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return f"{words}: {', '.join(keys[:SHOWN_KEYS])}{more}"

"""The reverse pass, torch only: a tape records a forward pass, rules reverse its ops."""

from lit_deconv.engine import rules  # fills the registry
from lit_deconv.engine.errors import (
    AmbiguousProduct,
    DeconvError,
    InputError,
    LayerError,
    SelectorError,
    UnsupportedOp,
)
from lit_deconv.engine.geometry import ReceptiveField, receptive_field
from lit_deconv.engine.recorder import record
from lit_deconv.engine.registry import RULES, reverse_rule
from lit_deconv.engine.signal import Signal, Window
from lit_deconv.engine.tape import Op, Options, Tape, Value
from lit_deconv.engine.undisturbed import undisturbed
from lit_deconv.engine.walk import on_path, pixels, walk, why_unsupported

__all__ = [
    "RULES",
    "AmbiguousProduct",
    "DeconvError",
    "InputError",
    "LayerError",
    "Op",
    "Options",
    "ReceptiveField",
    "SelectorError",
    "Signal",
    "Tape",
    "UnsupportedOp",
    "Value",
    "Window",
    "on_path",
    "pixels",
    "receptive_field",
    "record",
    "reverse_rule",
    "rules",
    "undisturbed",
    "walk",
    "why_unsupported",
]

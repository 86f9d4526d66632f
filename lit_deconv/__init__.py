"""See, in pixels, what a network learns while it learns.

The public classes are imported when they are first used, so that the command line can show its help
without waiting for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_deconv.version import __version__

if TYPE_CHECKING:
    from lit_deconv.attr import Deconvnet
    from lit_deconv.drop_in import Deconvolution, NeuronDeconvolution

__all__ = ["Deconvnet", "Deconvolution", "NeuronDeconvolution", "__version__"]

_HOMES = {
    "Deconvnet": "lit_deconv.attr",
    "Deconvolution": "lit_deconv.drop_in",
    "NeuronDeconvolution": "lit_deconv.drop_in",
}


def __getattr__(name: str) -> Any:
    """Import a public class on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

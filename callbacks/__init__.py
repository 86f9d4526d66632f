"""`DeconvCallback` for Lightning, and what keeps it unnoticed by training."""

from .deconv import DeconvCallback

__all__ = ["DeconvCallback"]

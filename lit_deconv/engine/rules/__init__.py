"""One reverse rule per aten op. Importing this package fills the registry."""

from lit_deconv.engine.rules import (
    convolution,
    linear_maps,
    local,
    normalisation,
    pointwise,
    pooling,
    products,
    rectifiers,
    resampling,
    shape,
)

__all__ = [
    "convolution",
    "linear_maps",
    "local",
    "normalisation",
    "pointwise",
    "pooling",
    "products",
    "rectifiers",
    "resampling",
    "shape",
]

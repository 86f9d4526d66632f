"""Looks through autograd's graph for what the function mode did not see: right, or refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from lit_deconv.engine.errors import AmbiguousProduct, UnsupportedOp
from lit_deconv.engine.rectified import RectifiedBackward

# Derivatives of rectifiers: every rectifier that the mode saw has another backward.
_RECTIFIERS = (
    "ReluBackward", "LeakyReluBackward", "PreluKernelBackward", "RreluWithNoiseBackward",
    "EluBackward", "CeluBackward", "SeluBackward", "GeluBackward", "SiluBackward", "MishBackward",
    "SoftplusBackward", "HardswishBackward",
)  # fmt: skip
# The same where these saved bounds are 0.
_BOUNDED = {
    "ClampBackward": ("_saved_min",),
    "ClampMinBackward": ("_saved_min",),
    "HardtanhBackward": ("_saved_min_val",),
    "ThresholdBackward": ("_saved_threshold",),
}
# Regions of compiled, scripted or recomputed code, and fused recurrent layers.
_CLOSED = (
    "CompiledFunction", "DifferentiableGraph", "CheckpointFunction", "MkldnnRnnLayer", "CudnnRnn",
    "MiopenRnn", "ThnnFused", "Foreach",
)  # fmt: skip
# Products, and which of their parents are factors.
_PRODUCTS = {
    "ProdBackward": (0, 0),  # of one tensor's own values
    "CumprodBackward": (0, 0),
    "LinalgCrossBackward": (0, 1),
    "XlogyBackward": (0, 1),
    "LerpBackward1": (1, 2),
    "MulBackward": (0, 1),
    "DivBackward": (0, 1),
    "MmBackward": (0, 1),
    "BmmBackward": (0, 1),
    "MvBackward": (0, 1),
    "DotBackward": (0, 1),
    "AddmmBackward": (1, 2),
    "AddbmmBackward": (1, 2),
    "BaddbmmBackward": (1, 2),
    "AddcmulBackward": (1, 2),
    "AddcdivBackward": (1, 2),
    "ConvolutionBackward": (0, 1),
    "ScaledDotProduct": (0, 1, 2),
}


def refuse_unseen(mode: RectifiedBackward, tensors: Iterable[Tensor]) -> None:
    """Raises where the signal on its way from these tensors meets what the mode did not see.

    Args:
        mode: Knows what depends on the inputs.
        tensors: Where signals start.

    Raises:
        UnsupportedOp: A rectifier, or code that hides its ops, ran unseen.
        AmbiguousProduct: So did a product of two activations.
    """
    stack: list[Any] = [tensor.grad_fn for tensor in tensors if mode.depends(tensor)]
    seen = set(stack)
    while stack:
        node = stack.pop()
        parents = [parent for parent, _ in node.next_functions]
        followed = [parent is not None and mode.node_depends(parent) for parent in parents]
        if any(followed):
            _check(node, followed, mode.gates)
        for parent, follow in zip(parents, followed, strict=True):
            if follow and parent not in seen:
                seen.add(parent)
                stack.append(parent)


@contextmanager
def recomputation_refused() -> Iterator[None]:
    """Says what to do where activation checkpointing runs the forward again without the mode."""
    try:
        yield
    except CheckpointError as error:
        raise UnsupportedOp(
            "the model recomputes activations (torch.utils.checkpoint), where rectifiers cannot be "
            "seen; switch checkpointing off"
        ) from error


def _check(node: Any, followed: list[bool], gates: str) -> None:
    name = node.name().split("::")[-1]
    bounds = next((saved for kind, saved in _BOUNDED.items() if name.startswith(kind)), None)
    if name.startswith(_RECTIFIERS) or (
        bounds is not None and all(_is_zero(getattr(node, bound, None)) for bound in bounds)
    ):
        raise UnsupportedOp(
            f"{name} is on the way of the signal: a rectifier ran inside code that cannot be "
            f"seen (scripted, traced, compiled or C++) and would be a plain gradient; call it "
            f"from Python"
        )
    if name.startswith(_CLOSED):
        raise UnsupportedOp(
            f"{name} is on the way of the signal: its ops cannot be seen, so rectifiers in it "
            f"would be plain gradients; run the model without scripting, checkpointing or fused "
            f"recurrence"
        )
    factors = next((where for kind, where in _PRODUCTS.items() if name.startswith(kind)), None)
    if gates == "gradient" or factors is None:
        return
    if sum(followed[place] for place in factors if place < len(followed)) > 1:
        raise AmbiguousProduct(
            f"{name} multiplies two activations where no gate can be told; gates='gradient' asks for "
            f"the product rule"
        )


def _is_zero(bound: Any) -> bool:
    return isinstance(bound, (int, float)) and bound == 0

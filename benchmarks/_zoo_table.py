"""What the zoo found, layer by layer, what it comes to, and both as text."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from importlib.metadata import version

# Largest relative error that counts as none: rounding in float32 and in float64.
SINGLE, DOUBLE = 1e-5, 1e-10


@dataclass(frozen=True)
class Row:
    """What was found at one layer of one model.

    Attributes:
        model: The model's name.
        layer: Dotted name of the layer.
        shape: Shape of its output, images first.
        path: "rules", "autograd", or "refused" with the error in ``why``.
        missing: Ops on the way that have no rule, with the number of times.
        refused: Ops on the way that have one which cannot take them, such as a reshape that puts
            windows of attention beside the images.
        why: The reason for autograd or the refusal, the first of them.
        layer_error: Largest relative error between the walks over the whole layer; None where only
            autograd can walk.
        unit_error: The same over single units, by windows in the rules' walk.
        layer_error_double: The same as ``layer_error`` in float64; None where not asked for.
        unit_error_double: The same as ``unit_error`` in float64.
        captum: Relative error of Captum's NeuronDeconvolution times the activation; NaN where
            Captum raised.
        faults: What ``explain()`` holds against Captum here.
    """

    model: str
    layer: str
    shape: tuple[int, ...]
    path: str
    missing: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    why: str = ""
    layer_error: float | None = None
    unit_error: float | None = None
    layer_error_double: float | None = None
    unit_error_double: float | None = None
    captum: float | None = None
    faults: tuple[str, ...] = ()

    @property
    def captum_agrees(self) -> bool:
        """Whether Captum's answer is ours, to the rounding of float32."""
        return self.captum is not None and self.captum <= SINGLE

    @property
    def contradiction(self) -> bool:
        """Whether Captum differs although ``explain()`` says that it is right."""
        return self.captum is not None and not self.faults and not self.captum_agrees

    def errors(self, double: bool) -> list[float]:
        """The errors between the two walks in one precision."""
        found = (
            (self.layer_error_double, self.unit_error_double)
            if double
            else (self.layer_error, self.unit_error)
        )
        return [error for error in found if error is not None]


@dataclass
class Zoo:
    """All rows, and what they come to.

    Attributes:
        rows: In the order of the models.
    """

    rows: list[Row] = field(default_factory=list)

    def models(self, path: str | None = None) -> list[str]:
        """Names of the models; those of one path: the least of their layers' decides."""
        order = ("rules", "autograd", "refused")
        worst: dict[str, str] = {}
        for row in self.rows:
            worst[row.model] = max(worst.get(row.model, "rules"), row.path, key=order.index)
        return [name for name, taken in worst.items() if path in (None, taken)]

    def largest(self, double: bool) -> float | None:
        """The largest error between the walks, None where none was measured."""
        return max((e for row in self.rows for e in row.errors(double)), default=None)

    def totals(self) -> list[str]:
        """The last lines of the table."""
        asked = [row for row in self.rows if row.captum is not None]
        faulted = [row for row in asked if row.faults]
        clean = [row for row in asked if not row.faults]
        return [
            f"models {len(self.models())}: by rules {len(self.models('rules'))}, "
            f"by autograd {len(self.models('autograd'))}, refused {len(self.models('refused'))}",
            f"layers {len(self.rows)}: by rules {sum(r.path == 'rules' for r in self.rows)}, "
            f"by autograd {sum(r.path == 'autograd' for r in self.rows)}, "
            f"refused {sum(r.path == 'refused' for r in self.rows)}",
            f"largest error of the rules' walk against the autograd walk: float32 "
            f"{_number(self.largest(False))} (allowed {SINGLE:g}), float64 "
            f"{_number(self.largest(True))} (allowed {DOUBLE:g})",
            f"Captum: no fault known at {len(clean)} layers, agrees at "
            f"{sum(row.captum_agrees for row in clean)} of them; a fault known at {len(faulted)}, "
            f"differs or raises at {sum(not row.captum_agrees for row in faulted)} of them",
        ]

    def failures(self) -> list[str]:
        """What must not be: refusals, errors beyond rounding, faults of Captum untold."""
        found = []
        for row in self.rows:
            if row.path == "refused":
                found.append(f"{row.model} {row.layer}: refused, {row.why}")
            for double, allowed in ((False, SINGLE), (True, DOUBLE)):
                if any(not error <= allowed for error in row.errors(double)):
                    found.append(f"{row.model} {row.layer}: error {row.errors(double)}")
            if row.contradiction:
                found.append(f"{row.model} {row.layer}: Captum is off by {row.captum}, untold")
        return found


HEAD = (
    "model", "layer", "output", "path", "no rule", "refused",
    "layer 32", "units 32", "layer 64", "units 64", "Captum", "told",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    if row.captum is None:
        captum = "-"
    elif row.captum != row.captum:
        captum = "raises"
    else:
        captum = "agrees" if row.captum_agrees else f"off by {row.captum:.1e}"
    kinds = {fault.split(" at ", 1)[0] for fault in row.faults}
    return (
        row.model,
        row.layer,
        " x ".join(map(str, row.shape)),
        row.path,
        ", ".join(row.missing) or "-",
        str(sum(int(op.split("(")[1][:-1]) for op in row.refused) or "-"),
        *(
            _number(error)
            for error in (
                row.layer_error,
                row.unit_error,
                row.layer_error_double,
                row.unit_error_double,
            )
        ),
        captum,
        ", ".join(sorted(kinds)) or "right",
    )


def markdown(zoo: Zoo, command: str, machine: str) -> str:
    """The table as a page of the documentation."""
    versions = ", ".join(
        f"{package} {version(package)}" for package in ("torch", "torchvision", "captum")
    )
    lines = [
        "# The zoo",
        "",
        f"Made by `{command}` on Python {platform.python_version()}, {versions}, {machine}.",
        "",
        *_EXPLANATION.strip().splitlines(),
        "",
        *(f"- {line}" for line in zoo.totals()),
        *(f"- fails: {line}" for line in zoo.failures()),
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + " --- |" * len(HEAD),
        *("| " + " | ".join(cells(row)) + " |" for row in zoo.rows),
    ]
    return "\n".join(lines) + "\n"


_EXPLANATION = """
Every classification and segmentation model of torchvision with random weights, on noise, at an
early, a middle and a late layer. *path* is what `path="auto"` takes. *no rule* names the ops, and
how many of them on the way, that have none; *refused* counts the others that rules cannot take,
such as windows of attention put beside the images. *layer* and *units* are the largest differences
between the rules' walk and the autograd walk over the same forward, relative to the largest value
of the reconstruction, in float32 and in float64: for the whole layer, and for the strongest unit of
two channels in each image, which the rules walk as windows. *Captum* is NeuronDeconvolution times
the activation, against ours; *told* is what `Deconvnet.explain()` says about it beforehand:
"right", or "plain gradient" (a rectifier that Captum does not see), "wrong" (one that it
misplaces), "other rule" (a gate or the statistics of a normalisation, which Captum's gradient
follows and the deconvnet keeps as constants). Where it tells a fault, Captum can still agree: a
rectifier right in front of the layer changes nothing for a unit that fires.
"""


def _number(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"

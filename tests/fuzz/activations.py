"""Rectifiers in every form, and functions that are none."""

from __future__ import annotations

from .constructs import construct
from .convolutions import convolve
from .rectifiers import RECTIFIERS, Form, Rectifier
from .writer import Variable, Writer


def rectify(
    w: Writer, x: Variable, rectifier: Rectifier | None = None, form: Form | None = None
) -> Variable:
    """Writes a rectifier of ``x`` in a form that the network allows."""
    rectifier = rectifier or (RECTIFIERS["relu"] if w.plain else _some_rectifier(w, x))
    forms = [
        f
        for f in rectifier.forms
        if (not f.inplace or w.may_overwrite(x)) and (not w.plain or f.kind.startswith("module"))
    ]
    if form is None:
        kind = w.rng.choice(sorted({f.kind for f in forms}))
        form = w.rng.choice([f for f in forms if f.kind == kind])
    w.constructs |= {f"rectifier:{rectifier.name}", f"form:{form.kind}"}
    if rectifier.name == "relu":
        w.constructs.add(f"relu:{form.kind}")
    user, value = w.read(x, saved=form.saves == "input" and not form.inplace)
    slope, slope_value = "", ""
    if rectifier.name == "prelu" and form.kind != "module":
        slope = w.parameter(x.channels)
        slope, slope_value = f"self.{slope}", f'p["{slope}"]'

    module = None
    if form.kind.startswith("module"):
        module = w.shared.get(form.text)
        if module and rectifier.name != "prelu" and not w.plain and w.rng.random() < 0.7:
            w.constructs.add("one rectifier module in several places")
        else:
            module = w.module(form.text.format(channels=x.channels), "act")
            w.shared[form.text] = module
        slope_value = f'p["{module}.weight"]'
        source = w.call(module, user)
    else:
        source = form.text.format(x=user, slope=slope)
    reference = f"rectify({value}, {rectifier.forward.format(slope=slope_value)})"

    if not form.inplace:
        if w.plain:
            x.storage.spent = True
        y = w.write(source, reference, x.shape, saved=form.saves == "output")
        y.storage.rectified = True
        return w.tap(module, y) if module else y
    # Captum is right only where the returned tensor is the one that is read.
    statement = " = " in source
    if statement or (not w.plain and (w.rng.random() < 0.5 or not user.isidentifier())):
        w.constructs.add("in place, returned tensor ignored")
        w.forward.append(source)
        w.overwrite(x, reference, form.saves == "output")
        y = x
    else:
        w.overwrite(x, reference, form.saves == "output")
        y = w.alias(source, x)
    if w.plain:
        x.storage.reads, x.storage.rectified = 0, True
        w.variables = [v for v in w.variables if v is y or v.storage is not x.storage]
    return w.tap(module, y) if module else y


def _some_rectifier(w: Writer, x: Variable) -> Rectifier:
    by_hand = x.name.isidentifier()
    names = [
        n
        for n in RECTIFIERS
        if (by_hand or n != "relu_by_hand") and (n != "silu_by_hand" or not x.storage.gate)
    ]
    return RECTIFIERS["relu" if w.rng.random() < 0.3 else w.rng.choice(names)]


@construct(22, plain=True, anywhere=True)
def rectifier(w: Writer) -> Variable | None:
    def untouched(v: Variable) -> bool:
        return not (v.storage.reads or v.storage.frozen or v.storage.rectified)

    x = w.pick(lambda v: not w.plain or untouched(v))
    if x is None and w.plain and (x := w.pick()):
        x = convolve(w, x)
    return rectify(w, x) if x else None


@construct(4, plain=True, anywhere=True)
def local_gradient(w: Writer) -> Variable | None:
    """Saturating functions that are not rectifiers."""
    x = w.pick()
    if x is None:
        return None
    name, source, gate = w.rng.choice(
        (
            ("tanh", "torch.tanh({x})", False),
            ("sigmoid", "torch.sigmoid({x})", True),
            ("hardsigmoid", "F.hardsigmoid({x})", True),
            ("softmax", "F.softmax({x}, dim=1)", True),
            ("clamp", "torch.clamp({x}, -0.6, 0.9)", False),
            ("hardtanh", "F.hardtanh({x})", False),
        )
    )
    w.constructs.add(f"local gradient:{name}")
    user, value = w.read(x)
    return w.write(source.format(x=user), source.format(x=value), x.shape, saved=True, gate=gate)


@construct(2, anywhere=True)
def contrast_normalisation(w: Writer) -> Variable | None:
    x = w.pick(lambda v: v.channels >= 2)
    if x is None:
        return None
    user, value = w.read(x)
    reference = f"unchanged({value}, lambda t: F.local_response_norm(t, 3, 0.5, 0.75, 1.0))"
    if w.rng.random() < 0.5:
        name = w.module("nn.LocalResponseNorm(3, 0.5, 0.75, 1.0)", "contrast")
        return w.tap(name, w.write(w.call(name, user), reference, x.shape))
    source = f"F.local_response_norm({user}, 3, 0.5, 0.75, 1.0)"
    return w.write(source, reference, x.shape)


@construct(2, plain=True)
def uncommon(w: Writer) -> Variable | None:
    """Ops that few networks use; where a rule is missing the other walk must serve."""
    x = w.pick()
    if x is None:
        return None
    name, source = w.rng.choice(
        (
            ("sin", "torch.sin({x})"),
            ("cumsum", "torch.cumsum({x}, 3)"),
            ("flip", "{x}.flip(3)"),
            ("roll", "torch.roll({x}, 1, 2)"),
            ("einsum", 'torch.einsum("nchw,cd->ndhw", {x}, {p})'),
            ("square root", "torch.sqrt({x} ** 2 + 1)"),
        )
    )
    w.constructs.add(f"uncommon:{name}")
    p = w.parameter(x.channels, x.channels) if "{p}" in source else ""
    user, value = w.read(x)
    return w.write(
        source.format(x=user, p=f"self.{p}"),
        source.format(x=value, p=f'p["{p}"]'),
        x.shape,
        saved=name == "square root",
    )

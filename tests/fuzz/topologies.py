"""Rectifiers where they are easily got wrong: on views, on shared tensors, beside skips."""

from __future__ import annotations

from .activations import rectify
from .channels import cat, part_of
from .constructs import construct
from .convolutions import convolve
from .rectifiers import RECTIFIERS
from .sums import add
from .writer import Variable, Writer


@construct(4, anywhere=True)
def rectified_part(w: Writer) -> Variable | None:
    """``y[:, :k].relu_()``: a view is overwritten, and the returned tensor ignored."""
    x = w.pick(lambda v: v.channels >= 2 and w.may_overwrite(v))
    if x is None:
        return None
    part = part_of(w, x)
    return x if _rectify_part(w, part) else None


def _rectify_part(w: Writer, part: Variable) -> bool:
    choice = [
        (r, f)
        for r in RECTIFIERS.values()
        if not r.name.endswith("by_hand")
        for f in r.forms
        if f.inplace
    ]
    rectify(w, part, *w.rng.choice(choice))
    return True


@construct(3, anywhere=True)
def assigned_part(w: Writer) -> Variable | None:
    """``y[:, :k] = F.relu(y[:, :k])``."""
    x = w.pick(lambda v: v.channels >= 2 and w.may_overwrite(v))
    if x is None:
        return None
    part = part_of(w, x)
    user, value = w.read(part, saved=False)
    w.forward.append(f"{user} = {w.rng.choice(('F.relu({x})', '{x}.relu()')).format(x=user)}")
    w.overwrite(part, f"rectify({value}, F.relu)", False)
    return x


@construct(3, anywhere=True)
def skip_from_before(w: Writer) -> Variable | None:
    """A convolution's output feeds a rectifier and, past it, a sum."""
    x = w.pick()
    if x is None:
        return None
    y = convolve(w, x)
    name = w.rng.choice([n for n in RECTIFIERS if not n.endswith("by_hand")])
    forms = RECTIFIERS[name].forms
    form = w.rng.choice([f for f in forms if not f.inplace or w.may_overwrite(y)])
    z = convolve(w, rectify(w, y, RECTIFIERS[name], form), y.channels)
    return add(w, z, y) if z.shape == y.shape else None


@construct(3, anywhere=True)
def two_rectifiers(w: Writer) -> Variable | None:
    """Two rectifiers read one tensor."""
    x = w.pick()
    if x is None:
        return None
    y = convolve(w, x)
    outputs = []
    for _ in range(2):
        name = w.rng.choice([n for n in RECTIFIERS if not n.endswith("by_hand")])
        form = w.rng.choice([f for f in RECTIFIERS[name].forms if not f.inplace])
        outputs.append(rectify(w, y, RECTIFIERS[name], form))
    return add(w, *outputs) if w.rng.random() < 0.5 else cat(w, *outputs)


@construct(2, anywhere=True)
def shared_module_in_branches(w: Writer) -> Variable | None:
    """One ReLU module serves two parallel branches."""
    x = w.pick()
    if x is None:
        return None
    rectifier = RECTIFIERS["relu"]
    form = w.rng.choice([f for f in rectifier.forms if f.kind.startswith("module")])
    module = w.module(form.text, "shared")
    outputs = []
    for _ in range(2):
        y = convolve(w, x, 3)
        user, value = w.read(y, saved=False)
        source, reference = w.call(module, user), f"rectify({value}, F.relu)"
        if form.inplace:
            w.overwrite(y, reference, True)
            outputs.append(w.tap(module, w.alias(source, y)))
        else:
            outputs.append(w.tap(module, w.write(source, reference, y.shape, saved=True)))
    return add(w, *outputs)

"""Sums, constants, and what returns the very tensor it was given."""

from __future__ import annotations

from .channels import part_of
from .constructs import construct, same_shape
from .convolutions import convolve
from .writer import Variable, Writer

SUMS = (
    ("{a} + {b}", "{a} + {b}"),
    ("torch.add({a}, {b}, alpha=0.5)", "{a} + 0.5 * {b}"),
    ("{a} - {b}", "{a} - {b}"),
    ("{a}.sub({b}, alpha=2)", "{a} - 2 * {b}"),
    ("torch.rsub({a}, {b})", "{b} - {a}"),
    ("torch.stack([{a}, {b}]).sum(0)", "{a} + {b}"),
    ("sum([{a}, {b}])", "{a} + {b}"),
)


def add(w: Writer, x: Variable, y: Variable) -> Variable:
    (a, va), (b, vb) = w.read(x, saved=False), w.read(y, saved=False)
    user, reference = SUMS[0] if w.rng.random() < 0.5 else w.rng.choice(SUMS)
    w.constructs.add("subtraction" if "-" in reference else "sum")
    return w.write(user.format(a=a, b=b), f"{reference.format(a=va, b=vb)}", x.shape)


@construct(6, plain=True, anywhere=True)
def residual(w: Writer) -> Variable | None:
    x = w.pick()
    if x is None:
        return None
    y = w.pick(same_shape(x))
    if y is None or w.rng.random() < 0.3:
        y = convolve(w, x, x.channels)
    return add(w, y, x) if x.shape == y.shape and not x.storage.spent else None


@construct(2, anywhere=True)
def residual_inplace(w: Writer) -> Variable | None:
    """``y += x``."""
    y = w.pick(w.may_overwrite)
    x = w.pick(same_shape(y)) if y else None
    if y is None or x is None or (x.storage is y.storage and not (x.whole and y.whole)):
        return None
    (a, va), (b, vb) = w.read(y, saved=False), w.read(x, saved=False)
    w.forward.append(w.rng.choice(("{a} += {b}", "{a}.add_({b})")).format(a=a, b=b))
    w.overwrite(y, f"{va} + {vb}", False)
    return y


@construct(1, plain=True)
def broadcast_sum(w: Writer) -> Variable | None:
    x = w.pick(lambda v: min(v.shape[1:]) > 1)
    if x is None:
        return None
    user, value = w.read(x, saved=False)
    source = "{x} + {x}.mean((2, 3), keepdim=True)"
    return w.write(source.format(x=user), source.format(x=value), x.shape)


CONSTANTS = (
    ("{x} * 0.5", "{x} * 0.5"),
    ("2 * {x}", "{x} * 2"),
    ("{x} / 1.7", "{x} / 1.7"),
    ("-{x}", "-{x}"),
    ("{x} + 0.3", "{x} + 0.3"),
    ("1 - {x}", "1 - {x}"),
    ("{x} - {p}", "{x} - {q}"),
    ("{x} * {p}", "{x} * {q}"),
    ("{x}.mul({p}).add(0.1)", "{x} * {q} + 0.1"),
    ("torch.mul({p}, {x})", "{x} * {q}"),
)


@construct(5, plain=True)
def constant(w: Writer) -> Variable | None:
    x = w.pick()
    if x is None:
        return None
    user, reference = w.rng.choice(CONSTANTS)
    a, value = w.read(x)
    p = w.parameter(x.channels, 1, 1) if "{p}" in user else ""
    return w.write(
        user.format(x=a, p=f"self.{p}"), reference.format(x=value, q=f'p["{p}"]'), x.shape
    )


@construct(2, anywhere=True)
def constant_inplace(w: Writer) -> Variable | None:
    x = w.pick(w.may_overwrite)
    if x is None:
        return None
    part = part_of(w, x) if x.channels >= 2 and w.rng.random() < 0.4 else x
    user, reference = w.rng.choice(
        (
            ("{x} *= 0.5", "{x} * 0.5"),
            ("{x}.mul_(-1.5)", "{x} * -1.5"),
            ("{x} += 0.3", "{x} + 0.3"),
            ("{x}.sub_(0.2)", "{x} - 0.2"),
            ("{x}.div_(2)", "{x} / 2"),
            ("{x}.neg_()", "-{x}"),
        )
    )
    a, value = w.read(part, saved=False)
    w.forward.append(user.format(x=a))
    w.overwrite(part, reference.format(x=value), False)
    return x


@construct(2, plain=True)
def dropout(w: Writer) -> Variable | None:
    """In eval it returns the very tensor it was given."""
    x = w.pick()
    if x is None:
        return None
    user, _ = w.read(x, saved=False)
    if w.rng.random() < 0.5:
        return w.alias(f"F.dropout({user}, 0.5, self.training)", x)
    name = w.module(w.rng.choice(("nn.Dropout(0.5)", "nn.Dropout2d(0.3)")), "drop")
    return w.tap(name, w.alias(w.call(name, user), x))


@construct(4, plain=True, anywhere=True)
def identity(w: Writer) -> Variable | None:
    """A named point in the graph."""
    x = w.pick()
    if x is None:
        return None
    user, _ = w.read(x, saved=False)
    name = w.module("nn.Identity()", "tap")
    return w.tap(name, w.alias(w.call(name, user), x))

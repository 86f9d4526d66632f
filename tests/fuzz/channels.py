"""What takes channels apart and puts them together."""

from __future__ import annotations

from .constructs import construct, same_map
from .writer import Variable, Writer


def part_of(w: Writer, x: Variable) -> Variable:
    """The expression of a proper channel range of ``x``."""
    first = w.rng.randint(0, x.channels - 1)
    last = w.rng.randint(first + 1, x.channels - (first == 0))
    return Variable(f"{x.name}[:, {first}:{last}]", x.storage, x.first + first, x.first + last)


@construct(3, plain=True, anywhere=True)
def channel_slice(w: Writer) -> Variable | None:
    x = w.pick(lambda v: v.channels >= 2)
    if x is None:
        return None
    first = w.rng.randint(0, x.channels - 2)
    last = w.rng.randint(first + 1, x.channels)
    user, _ = w.read(x, saved=False)
    source = w.rng.choice(
        (f"{user}[:, {first}:{last}]", f"{user}.narrow(1, {first}, {last - first})")
    )
    return w.alias(source, x, first, last)


@construct(3, plain=True, anywhere=True)
def split(w: Writer) -> Variable | None:
    x = w.pick(lambda v: v.channels >= 2)
    if x is None:
        return None
    user, _ = w.read(x, saved=False)
    x.storage.frozen = True  # PyTorch forbids overwriting one of several views
    k = (x.channels + 1) // 2
    source = w.rng.choice((f"{user}.chunk(2, 1)", f"torch.split({user}, {k}, 1)"))
    names = w.name("h"), w.name("h")
    w.forward.append(f"{', '.join(names)} = {source}")
    w.add(Variable(names[0], x.storage, x.first, x.first + k))
    return w.add(Variable(names[1], x.storage, x.first + k, x.last))


@construct(1, plain=True, anywhere=True)
def strided_channels(w: Writer) -> Variable | None:
    x = w.pick(lambda v: v.channels >= 3)
    if x is None:
        return None
    user, value = w.read(x, saved=False)
    x.storage.frozen = True
    shape = ((x.channels + 1) // 2, *x.shape[1:])
    gate = x.storage.gate
    return w.write(f"{user}[:, ::2]", f"{value}[:, ::2]", shape, frozen=True, gate=gate)


@construct(2, plain=True)
def channel_shuffle(w: Writer) -> Variable | None:
    x = w.pick(lambda v: v.channels % 2 == 0 and v.channels >= 4)
    if x is None:
        return None
    c, h, width = x.shape
    user, value = w.read(x, saved=False)
    source = (
        f".reshape(-1, 2, {c // 2}, {h}, {width}).transpose(1, 2).reshape(-1, {c}, {h}, {width})"
    )
    return w.write(user + source, value + source, x.shape, gate=x.storage.gate)


def cat(w: Writer, x: Variable, y: Variable) -> Variable:
    (a, va), (b, vb) = w.read(x, saved=False), w.read(y, saved=False)
    shape = (x.channels + y.channels, *x.shape[1:])
    return w.write(f"torch.cat([{a}, {b}], 1)", f"torch.cat([{va}, {vb}], 1)", shape)


@construct(5, plain=True, anywhere=True)
def concatenation(w: Writer) -> Variable | None:
    x = w.pick(lambda v: v.channels <= 4)
    if x is None:
        return None
    y = w.pick(lambda v: same_map(x)(v) and v.channels <= 4)
    return cat(w, x, y) if y else None

"""Constructs in which one activation multiplies another."""

from __future__ import annotations

from .constructs import construct
from .convolutions import convolve
from .writer import Variable, Writer


def _gated(w: Writer) -> Variable | None:
    """Something a gate can be put on: a map that is no gate itself."""
    return w.pick(lambda v: min(v.shape[1:]) > 1 and not v.storage.gate)


def _product(w: Writer, x: Variable, factor: str, factor_value: str) -> Variable:
    """Writes ``x * factor`` in one of the forms of a product."""
    w.constructs.add("gate")
    if w.may_overwrite(x) and w.rng.random() < 0.2:
        user, value = w.read(x, saved=False)
        w.constructs.add("gate in place")
        w.forward.append(w.rng.choice(("{x} *= {f}", "{x}.mul_({f})")).format(x=user, f=factor))
        w.overwrite(x, f"gate({value}, {factor_value})", False)
        return x
    user, value = w.read(x)
    form = w.rng.choice(("{x} * {f}", "{f} * {x}", "torch.mul({x}, {f})", "{x}.mul({f})"))
    return w.write(form.format(x=user, f=factor), f"gate({value}, {factor_value})", x.shape)


def _named(w: Writer, user: str, reference: str) -> tuple[str, str]:
    """Gives a gate a name of its own in both forms."""
    name = w.name("g")
    w.forward.append(f"{name} = {user}")
    return name, w.evaluate(reference)


@construct(3)
def squeeze_and_excite(w: Writer) -> Variable | None:
    """x * sigmoid(conv(relu(conv(mean(x)))))."""
    x = _gated(w)
    if x is None:
        return None
    c = x.channels
    down = w.module(f"nn.Conv2d({c}, 2, 1)", "squeeze")
    up = w.module(f"nn.Conv2d(2, {c}, 1)", "excite")
    last = w.rng.choice(("torch.sigmoid", "F.hardsigmoid", "F.relu"))
    w.constructs.add(f"squeeze-and-excite:{last}")
    mean = w.rng.choice(("{x}.mean((2, 3), keepdim=True)", "F.adaptive_avg_pool2d({x}, 1)"))
    user, value = w.read(x, saved=mean.startswith("F"))
    gate = _named(
        w,
        f"{last}(self.{up}(F.relu(self.{down}({mean.format(x=user)}))))",
        _last(last).format(
            x=f"F.conv2d(rectify(F.conv2d({value}.mean((2, 3), keepdim=True), "
            f'p["{down}.weight"], p["{down}.bias"]), F.relu), p["{up}.weight"], p["{up}.bias"])'
        ),
    )
    return _product(w, x, *gate)


def _last(name: str) -> str:
    return "rectify({x}, F.relu)" if name == "F.relu" else f"{name}({{x}})"


@construct(2, anywhere=True)
def gated_linear_unit(w: Writer) -> Variable | None:
    """``F.glu``: the first half of the channels times the sigmoid of the second."""
    x = w.pick(lambda v: v.channels % 2 == 0)
    if x is None:
        return None
    half = x.channels // 2
    user, value = w.read(x)
    reference = f"gate({value}[:, :{half}], torch.sigmoid({value}[:, {half}:]))"
    shape = (half, *x.shape[1:])
    if w.rng.random() < 0.4:
        name = w.module("nn.GLU(1)", "glu")
        return w.tap(name, w.write(w.call(name, user), reference, shape))
    return w.write(f"F.glu({user}, 1)", reference, shape)


@construct(2)
def linear_gate(w: Writer) -> Variable | None:
    """Squeeze-and-excite by a linear layer, the gate viewed or expanded to the map's shape."""
    x = _gated(w)
    if x is None:
        return None
    c = x.channels
    name = w.module(f"nn.Linear({c}, {c})", "excite")
    user, value = w.read(x, saved=False)
    view = w.rng.choice(("[:, :, None, None]", ".view(-1, {c}, 1, 1)", ".expand_as"))
    w.constructs.add(f"linear gate:{view}")
    suffix = view.format(c=c)
    expanded = f"[:, :, None, None].expand_as({user})" if view == ".expand_as" else suffix
    gate = _named(
        w,
        f"torch.sigmoid(self.{name}({user}.mean((2, 3)))){expanded}",
        f'torch.sigmoid(F.linear({value}.mean((2, 3)), p["{name}.weight"], p["{name}.bias"]))'
        "[:, :, None, None]",
    )
    return _product(w, x, *gate)


ATTENTION = (
    "one channel",
    "softmax",
    "half",
    "scaled",
    "own hardsigmoid",
    "own softmax",
    "other",
)


@construct(4, anywhere=True)
def attention(w: Writer) -> Variable | None:
    """A gate of the map's own size: sigmoid or softmax of a convolution, or of its own."""
    x = _gated(w)
    if x is None:
        return None
    kind = w.rng.choice(ATTENTION)
    w.constructs.add(f"attention:{kind}")
    user, value = w.read(x)
    if kind == "scaled":
        source = "torch.sigmoid(1.702 * {x})"
        return _product(w, x, source.format(x=user), source.format(x=value))
    if kind.startswith("own"):
        source = "F.hardsigmoid({x})" if kind == "own hardsigmoid" else "{x}.softmax(dim=1)"
        return _product(w, x, source.format(x=user), source.format(x=value))
    if kind == "half":
        y = convolve(w, x, 4, "square" if min(x.shape[1:]) > 3 else "pointwise")
        user, value = w.read(y)
        y.storage.frozen = True
        a, b = w.name("h"), w.name("h")
        w.forward.append(f"{a}, {b} = {user}.chunk(2, 1)")
        half = w.add(Variable(a, y.storage, y.first, y.first + 2))
        return _product(w, half, f"{b}.sigmoid()", f"{value}[:, 2:].sigmoid()")
    if kind == "other":
        other = w.pick(lambda v: v.shape[1:] == x.shape[1:]) or x
        y = convolve(w, other, x.channels)
        user, value = w.read(y)
        return _product(w, x, f"{user}.sigmoid()", f"{value}.sigmoid()")
    y = convolve(w, x, 1 if kind == "one channel" else x.channels)
    user, value = w.read(y)
    source = "torch.sigmoid({x})" if kind == "one channel" else "{x}.softmax(dim=1)"
    return _product(w, x, *_named(w, source.format(x=user), source.format(x=value)))


@construct(1, anywhere=True)
def gated_residual(w: Writer) -> Variable | None:
    """x + x * sigmoid(conv(x))."""
    x = _gated(w)
    if x is None:
        return None
    y = convolve(w, x, x.channels)
    (user, value), (a, va) = w.read(x), w.read(y)
    w.constructs.add("gate")
    return w.write(
        f"{user} + {user} * {a}.sigmoid()", f"{value} + gate({value}, {va}.sigmoid())", x.shape
    )


@construct(1, anywhere=True)
def ambiguous_product(w: Writer) -> Variable | None:
    """A product of which neither or both factors are gates: to be refused."""
    x = w.pick(lambda v: min(v.shape[1:]) > 1)
    if x is None:
        return None
    y, z = convolve(w, x, 3), convolve(w, x, 3)
    (a, va), (b, vb) = w.read(y), w.read(z)
    kind = w.rng.choice(("{0} * {1}", "{0}.sigmoid() * {1}.sigmoid()", "{0} * {0}"))
    if kind.startswith("{0}."):
        va, vb = f"{va}.sigmoid()", f"{vb}.sigmoid()"
    reference = f"ambiguous({va}, {va if kind.endswith('{0}') else vb})"
    return w.write(kind.format(a, b), reference, y.shape)

"""Convolutions of every kind, batch norm and linear layers."""

from __future__ import annotations

from .constructs import construct
from .rectifiers import RECTIFIERS
from .writer import Storage, Variable, Writer

CONVOLUTIONS = (
    "square",
    "strided",
    "dilated",
    "grouped",
    "depthwise",
    "pointwise",
    "oblong",
    "same",
    "circular",
    "reflect",
    "replicate",
    "transposed",
    "functional",
)


def convolve(
    w: Writer, x: Variable, channels: int | None = None, kind: str | None = None
) -> Variable:
    """Writes a convolution of ``x``; with ``channels`` given it keeps the map's size."""
    if len(x.shape) != 3:
        return _convolve_anywhere(w, x, channels)
    rng, (c, h, width) = w.rng, x.shape
    keeps = channels is not None
    if kind is None:
        if keeps:
            kind = rng.choice(("square", "pointwise", "same", "circular", "functional"))
        else:
            kind = rng.choice(CONVOLUTIONS)
    if min(h, width) < 4 or (kind == "transposed" and max(h, width) > 14):
        kind = "pointwise"
    out = channels if channels is not None else rng.randint(2, 4)
    bias = rng.random() < 0.8
    kernel, stride, padding, dilation, groups = (3, 3), 1, (1, 1), 1, 1
    if kind == "square" and not keeps:
        padding = rng.choice(((0, 0), (1, 1), (1, 0)))
    elif kind == "strided":
        kernel = rng.choice(((2, 2), (3, 3), (1, 1), (3, 2)))
        stride, padding = rng.choice((2, 3)), (0, 0) if kernel[1] < 3 else (1, 1)
    elif kind == "dilated":
        dilation, padding = 2, rng.choice(((2, 2), (1, 2)))
    elif kind == "grouped" and c % 2 == 0:
        groups, out = 2, rng.choice((2, 4))
    elif kind == "depthwise":
        groups, out = c, c * rng.choice((1, 1, 2)) if c < 4 else c
    elif kind == "pointwise":
        kernel, padding = (1, 1), (0, 0)
    elif kind == "oblong":
        kernel, padding = rng.choice((((1, 3), (0, 1)), ((3, 1), (1, 0)), ((2, 3), (0, 0))))
    w.constructs.add(f"convolution:{kind}")

    if kind == "transposed":
        stride = rng.choice((1, 2))
        extra = rng.choice((0, 1)) if stride == 2 else 0
        options = f"{stride}, {padding}, {extra}"
        groups = 2 if c % 2 == 0 and out % 2 == 0 and rng.random() < 0.3 else 1
        rows, columns = ((n - 1) * stride - 2 + 3 + extra for n in (h, width))
        name = w.module(
            f"nn.ConvTranspose2d({c}, {out}, 3, {options}, groups={groups}, bias={bias})", "up"
        )
        user, value = w.read(x)
        reference = (
            f'F.conv_transpose2d({value}, p["{name}.weight"], {_bias(name, bias)}, {options}, '
            f"{groups})"
        )
        return w.tap(name, w.write(w.call(name, user), reference, (out, rows, columns)))

    rows, columns = (
        (n + 2 * p - dilation * (k - 1) - 1) // stride + 1
        for n, p, k in zip((h, width), padding, kernel, strict=True)
    )
    if min(rows, columns) < 1:
        return convolve(w, x, channels, "pointwise")
    if kind == "functional":
        weight = w.parameter(out, c, *kernel)
        user, value = w.read(x)
        return w.write(
            f"F.conv2d({user}, self.{weight}, None, {stride}, {padding})",
            f'F.conv2d({value}, p["{weight}"], None, {stride}, {padding})',
            (out, rows, columns),
        )
    border = '"same"' if kind == "same" else str(padding)
    mode = kind if kind in ("circular", "reflect", "replicate") else "zeros"
    name = w.module(
        f"nn.Conv2d({c}, {out}, {kernel}, {stride}, {border}, {dilation}, {groups}, "
        f'bias={bias}, padding_mode="{mode}")',
        "conv",
    )
    user, value = w.read(x)
    if mode != "zeros":
        value, border = f'F.pad({value}, (1, 1, 1, 1), mode="{mode}")', "0"
    reference = (
        f'F.conv2d({value}, p["{name}.weight"], {_bias(name, bias)}, {stride}, {border}, '
        f"{dilation}, {groups})"
    )
    return w.tap(name, w.write(w.call(name, user), reference, (out, rows, columns)))


def _convolve_anywhere(w: Writer, x: Variable, channels: int | None) -> Variable:
    """A convolution of a signal or a volume; with ``channels`` given it keeps the map's size."""
    rng, c, extents = w.rng, x.channels, x.shape[1:]
    d, keeps = len(extents), channels is not None
    out = channels if channels is not None else rng.randint(2, 4)
    kernel, stride, padding, dilation = rng.choice(
        ((3, 1, 1, 1), (1, 1, 0, 1), (3, 1, 2, 2))
        if keeps or min(extents) < 4
        else ((3, 1, 0, 1), (3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 2, 2), (1, 1, 0, 1))
    )
    groups = 2 if c % 2 == 0 and out % 2 == 0 and rng.random() < 0.3 else 1
    bias = rng.random() < 0.8
    w.constructs.add(f"convolution:{d}-D")
    shape = tuple((n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in extents)
    name = w.module(
        f"nn.Conv{d}d({c}, {out}, {kernel}, {stride}, {padding}, {dilation}, {groups}, bias={bias})",
        "conv",
    )
    user, value = w.read(x)
    reference = (
        f'F.conv{d}d({value}, p["{name}.weight"], {_bias(name, bias)}, {stride}, {padding}, '
        f"{dilation}, {groups})"
    )
    return w.tap(name, w.write(w.call(name, user), reference, (out, *shape)))


def _bias(name: str, bias: bool) -> str:
    return f'p["{name}.bias"]' if bias else "None"


@construct(20, plain=True, anywhere=True)
def convolution(w: Writer) -> Variable | None:
    x = w.pick()
    return convolve(w, x) if x else None


@construct(5, plain=True, anywhere=True)
def batch_norm(w: Writer) -> Variable | None:
    x = w.pick()
    return _normalise(w, x) if x else None


def _batch_norm(name: str, value: str) -> str:
    keys = ("running_mean", "running_var", "weight", "bias")
    arguments = ", ".join([value, *(f'p["{name}.{key}"]' for key in keys)])
    return f"F.batch_norm({arguments})"


def _normalise(w: Writer, x: Variable) -> Variable:
    name = w.module(f"nn.BatchNorm{len(x.shape) - 1}d({x.channels})", "norm")
    user, value = w.read(x)
    return w.tap(name, w.write(w.call(name, user), _batch_norm(name, value), x.shape))


@construct(3, anywhere=True)
def normalisation(w: Writer) -> Variable | None:
    """Normalisation by the image's own statistics, which are constants like a gate."""
    x = w.pick(lambda v: v.channels % 2 == 0 and min(v.shape[1:]) > 1)
    if x is None:
        return None
    c, d = x.channels, len(x.shape) - 1
    kind = w.rng.choice(("group", "instance", "layer", "channels last"))
    w.constructs.add(f"normalisation:{kind}")
    user, value = w.read(x)
    if kind == "layer":
        source = f"F.layer_norm({{x}}, {x.shape})"
        reference = f"normalised({value}, lambda t: {source}, 1, {value}.new_ones({c}))"
        return w.write(source.format(x=user), reference.format(x="t"), x.shape)
    if kind == "channels last":
        weight = w.parameter(c)
        source = f"F.layer_norm({{x}}.movedim(1, -1), ({c},), {{p}}).movedim(-1, 1)"
        function = source.format(x="t", p=f'p["{weight}"]')
        reference = f'normalised({value}, lambda t: {function}, 0, p["{weight}"])'
        return w.write(source.format(x=user, p=f"self.{weight}"), reference, x.shape)
    groups = c if kind == "instance" else 2
    constructor = f"nn.InstanceNorm{d}d({c}, affine=True)"
    name = w.module(constructor if kind == "instance" else f"nn.GroupNorm(2, {c})", "norm")
    affine = f'p["{name}.weight"], p["{name}.bias"]'
    function = f"F.group_norm(t, {groups}, {affine})"
    if kind == "instance":
        function = f"F.instance_norm(t, None, None, {affine})"
    reference = f'normalised({value}, lambda t: {function}, {groups}, p["{name}.weight"])'
    return w.tap(name, w.write(w.call(name, user), reference, x.shape))


@construct(5, plain=True)
def block(w: Writer) -> Variable | None:
    """An ``nn.Sequential`` of convolution, batch norm and a rectifier that may work in place."""
    x = w.pick(lambda v: min(v.shape[1:]) >= 3)
    if x is None:
        return None
    rectifier = RECTIFIERS["relu" if w.plain else w.rng.choice(("relu", "leaky_relu", "relu6"))]
    forms = [f for f in rectifier.forms if f.kind.startswith("module")]
    form, out = w.rng.choice(forms), w.rng.randint(2, 4)
    name = w.module(
        f"nn.Sequential(nn.Conv2d({x.channels}, {out}, 3, 1, 1), nn.BatchNorm2d({out}), "
        f"{form.text})",
        "block",
    )
    user, value = w.read(x)
    shape = (out, *x.shape[1:])
    convolved = f'F.conv2d({value}, p["{name}.0.weight"], p["{name}.0.bias"], 1, 1)'
    inner = Storage(w.evaluate(convolved), shape)
    w.tap(f"{name}.0", Variable("", inner, 0, out))
    normalised = Storage(w.evaluate(_batch_norm(f"{name}.1", inner.value)), shape)
    w.tap(f"{name}.1", Variable("", normalised, 0, out))
    if form.inplace:
        normalised.version += 1
    y = w.write(
        w.call(name, user),
        f"rectify({normalised.value}, {rectifier.forward})",
        shape,
        saved=form.saves == "output",
    )
    y.storage.rectified = True
    w.tap(f"{name}.2", y)
    return w.tap(name, y)


@construct(2, plain=True)
def linear_bottleneck(w: Writer) -> Variable | None:
    x = w.pick(lambda v: min(v.shape[1:]) >= 3)
    if x is None:
        return None
    out = w.rng.randint(2, 3)
    name = w.module(f"nn.Linear({x.channels * 9}, {out * 9})", "linear")
    user, value = w.read(x)
    pooled = "F.adaptive_avg_pool2d({x}, (3, 3)).flatten(1)"
    back = f".view(-1, {out}, 3, 3)"
    return w.write(
        w.call(name, pooled.format(x=user)) + back,
        f'F.linear({pooled.format(x=value)}, p["{name}.weight"], p["{name}.bias"]){back}',
        (out, 3, 3),
    )

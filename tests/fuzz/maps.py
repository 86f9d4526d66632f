"""What changes the size of a map: pooling, interpolation, padding, cropping."""

from __future__ import annotations

from .constructs import construct
from .writer import Variable, Writer


def _pooled(n: int, kernel: int, stride: int, padding: int, ceil: bool) -> int:
    size = (n + 2 * padding - kernel + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (size - 1) * stride >= n + padding:
        size -= 1
    return size


@construct(7, plain=True)
def max_pool(w: Writer) -> Variable | None:
    x = w.pick(lambda v: min(v.shape[1:]) >= 4)
    if x is None:
        return None
    kernel, stride, padding = w.rng.choice(((2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0)))
    ceil = w.rng.random() < 0.4
    w.constructs.add("max-pool:overlapping" if kernel > stride else "max-pool:apart")
    w.constructs |= {f"max-pool:ceil={ceil}", f"max-pool:padding={padding}"}
    options = f"{kernel}, {stride}, {padding}, ceil_mode={ceil}"
    rows, columns = (_pooled(n, kernel, stride, padding, ceil) for n in x.shape[1:])
    user, value = w.read(x)
    reference = f"F.max_pool2d({value}, {options})"
    if w.rng.random() < 0.5:
        name = w.module(f"nn.MaxPool2d({options})", "pool")
        return w.tap(name, w.write(w.call(name, user), reference, (x.channels, rows, columns)))
    return w.write(f"F.max_pool2d({user}, {options})", reference, (x.channels, rows, columns))


@construct(4, plain=True, anywhere=True)
def pool_anywhere(w: Writer) -> Variable | None:
    """Largest or mean value of a signal or a volume."""
    x = w.pick(lambda v: len(v.shape) != 3 and min(v.shape[1:]) >= 3)
    if x is None:
        return None
    d, kind = len(x.shape) - 1, w.rng.choice(("max", "avg"))
    kernel, stride, padding = w.rng.choice(((2, 2, 0), (3, 2, 1), (3, 1, 1)))
    extents = [_pooled(n, kernel, stride, padding, False) for n in x.shape[1:]]
    w.constructs.add(f"{kind} pool:{d}-D")
    user, value = w.read(x)
    source = f"F.{kind}_pool{d}d({{}}, {kernel}, {stride}, {padding})"
    return w.write(source.format(user), source.format(value), (x.channels, *extents))


@construct(3, plain=True)
def average_pool(w: Writer) -> Variable | None:
    x = w.pick(lambda v: min(v.shape[1:]) >= 4)
    if x is None:
        return None
    kernel, stride, padding = w.rng.choice(((2, 2, 0), (3, 2, 1), (3, 1, 1)))
    ceil, counts = w.rng.random() < 0.4, w.rng.random() < 0.5
    options = f"{kernel}, {stride}, {padding}, ceil_mode={ceil}, count_include_pad={counts}"
    rows, columns = (_pooled(n, kernel, stride, padding, ceil) for n in x.shape[1:])
    user, value = w.read(x)
    name = w.module(f"nn.AvgPool2d({options})", "pool")
    # Contiguous, since PyTorch had the backward of others wrong on CUDA (#188344).
    reference = f"F.avg_pool2d({value}.contiguous(), {options})"
    return w.tap(name, w.write(w.call(name, user), reference, (x.channels, rows, columns)))


@construct(2, plain=True)
def adaptive_pool(w: Writer) -> Variable | None:
    x = w.pick(lambda v: min(v.shape[1:]) >= 4)
    if x is None:
        return None
    kind, size = w.rng.choice(("avg", "max")), w.rng.choice(((4, 4), (3, 5), (6, 4)))
    w.constructs.add(f"adaptive pool:{kind}")
    user, value = w.read(x)
    source = f"F.adaptive_{kind}_pool2d({{}}, {size})"
    return w.write(source.format(user), source.format(value), (x.channels, *size))


@construct(3, plain=True)
def interpolation(w: Writer) -> Variable | None:
    x = w.pick(lambda v: max(v.shape[1:]) <= 11)
    if x is None:
        return None
    c, h, width = x.shape
    mode = w.rng.choice(("nearest", "bilinear", "nearest-exact"))
    w.constructs.add(f"interpolation:{mode}")
    corners = f", align_corners={w.rng.random() < 0.5}" if mode == "bilinear" else ""
    size = w.rng.choice(((2 * h, 2 * width), (h + 3, width + 2)))
    options = f'size={size}, mode="{mode}"{corners}'
    user, value = w.read(x, saved=False)
    return w.write(
        f"F.interpolate({user}, {options})", f"F.interpolate({value}, {options})", (c, *size)
    )


@construct(3, plain=True)
def padding(w: Writer) -> Variable | None:
    x = w.pick(lambda v: min(v.shape[1:]) >= 4 and max(v.shape[1:]) <= 20)
    if x is None:
        return None
    c, h, width = x.shape
    left, right, top, bottom = (w.rng.randint(0, 2) for _ in range(4))
    mode = w.rng.choice(("constant", "reflect", "replicate", "circular"))
    w.constructs.add(f"padding:{mode}")
    options = f'({left}, {right}, {top}, {bottom}), mode="{mode}"'
    user, value = w.read(x, saved=False)
    x.storage.frozen = True  # a padding of nothing may return its input
    shape = (c, h + top + bottom, width + left + right)
    gate = x.storage.gate and shape == x.shape
    source = f"F.pad({{}}, {options})"
    return w.write(source.format(user), source.format(value), shape, frozen=True, gate=gate)


@construct(2, plain=True)
def crop(w: Writer) -> Variable | None:
    x = w.pick(lambda v: min(v.shape[1:]) >= 5)
    if x is None:
        return None
    c, h, width = x.shape
    user, value = w.read(x, saved=False)
    x.storage.frozen = True
    part = "[:, :, 1:, :-1]"
    shape, gate = (c, h - 1, width - 1), x.storage.gate
    return w.write(f"{user}{part}", f"{value}{part}", shape, frozen=True, gate=gate)

"""Every rectifier of the design in every form in which users write it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """One way to write a rectifier.

    Args:
        kind: module, function or method; with ``_inplace`` if it overwrites its input.
        text: source with ``{x}`` for the input, or for modules the constructor; ``{slope}`` is a
            parameter of the network with one slope per channel.
        saves: what autograd keeps for its own backward: input, output or nothing. Overwriting
            what is kept makes a network that cannot be trained.
    """

    kind: str
    text: str
    saves: str

    @property
    def inplace(self) -> bool:
        return self.kind.endswith("inplace")


@dataclass(frozen=True)
class Rectifier:
    """One rectifier: the forward function of the reference, and the forms users write."""

    name: str
    forward: str
    forms: tuple[Form, ...]


def _rectifier(
    name: str,
    forward: str,
    *,
    modules: tuple[str, ...] = (),
    functions: tuple[str, ...] = (),
    methods: tuple[str, ...] = (),
    overwriting_modules: tuple[str, ...] = (),
    overwriting_functions: tuple[str, ...] = (),
    overwriting_methods: tuple[str, ...] = (),
    saves: str = "input",
    overwriting_saves: str = "output",
) -> Rectifier:
    forms = []
    for kind, texts in (("module", modules), ("function", functions), ("method", methods)):
        forms += [Form(kind, text, saves) for text in texts]
    for kind, texts in (
        ("module", overwriting_modules),
        ("function", overwriting_functions),
        ("method", overwriting_methods),
    ):
        forms += [Form(f"{kind}_inplace", text, overwriting_saves) for text in texts]
    return Rectifier(name, forward, tuple(forms))


RECTIFIERS = {
    rectifier.name: rectifier
    for rectifier in (
        _rectifier(
            "relu",
            "F.relu",
            modules=("nn.ReLU()",),
            functions=("F.relu({x})", "torch.relu({x})"),
            methods=("{x}.relu()",),
            overwriting_modules=("nn.ReLU(inplace=True)",),
            overwriting_functions=("F.relu_({x})", "torch.relu_({x})", "F.relu({x}, inplace=True)"),
            overwriting_methods=("{x}.relu_()",),
            saves="output",
        ),
        _rectifier(
            "relu6",
            "F.relu6",
            modules=("nn.ReLU6()",),
            functions=("F.relu6({x})",),
            overwriting_modules=("nn.ReLU6(inplace=True)",),
            overwriting_functions=("F.relu6({x}, inplace=True)",),
        ),
        _rectifier(
            "leaky_relu",
            "lambda t: F.leaky_relu(t, 0.1)",
            modules=("nn.LeakyReLU(0.1)",),
            functions=("F.leaky_relu({x}, 0.1)",),
            overwriting_modules=("nn.LeakyReLU(0.1, inplace=True)",),
            overwriting_functions=("F.leaky_relu_({x}, 0.1)", "F.leaky_relu({x}, 0.1, True)"),
        ),
        _rectifier(
            "prelu",
            "lambda t: F.prelu(t, {slope})",
            modules=("nn.PReLU({channels})",),
            functions=("F.prelu({x}, {slope})", "torch.prelu({x}, {slope})"),
            methods=("{x}.prelu({slope})",),
        ),
        _rectifier(
            "elu",
            "lambda t: F.elu(t, 0.7)",
            modules=("nn.ELU(0.7)",),
            functions=("F.elu({x}, 0.7)",),
            overwriting_modules=("nn.ELU(0.7, inplace=True)",),
            overwriting_functions=("F.elu_({x}, 0.7)", "F.elu({x}, 0.7, inplace=True)"),
        ),
        _rectifier(
            "selu",
            "F.selu",
            modules=("nn.SELU()",),
            functions=("F.selu({x})", "torch.selu({x})"),
            overwriting_modules=("nn.SELU(inplace=True)",),
            overwriting_functions=("F.selu_({x})", "torch.selu_({x})"),
        ),
        _rectifier(
            "celu",
            "lambda t: F.celu(t, 0.8)",
            modules=("nn.CELU(0.8)",),
            functions=("F.celu({x}, 0.8)",),
            overwriting_modules=("nn.CELU(0.8, inplace=True)",),
            overwriting_functions=("F.celu_({x}, 0.8)", "F.celu({x}, 0.8, inplace=True)"),
        ),
        _rectifier("gelu", "F.gelu", modules=("nn.GELU()",), functions=("F.gelu({x})",)),
        _rectifier(
            "gelu_tanh",
            'lambda t: F.gelu(t, approximate="tanh")',
            modules=('nn.GELU(approximate="tanh")',),
            functions=('F.gelu({x}, approximate="tanh")',),
        ),
        _rectifier(
            "silu",
            "F.silu",
            modules=("nn.SiLU()",),
            functions=("F.silu({x})",),
            overwriting_modules=("nn.SiLU(inplace=True)",),
            overwriting_functions=("F.silu({x}, inplace=True)",),
            overwriting_saves="nothing",
        ),
        _rectifier(
            "silu_by_hand",
            "lambda t: t * torch.sigmoid(t)",
            functions=(
                "{x} * torch.sigmoid({x})",
                "torch.sigmoid({x}) * {x}",
                "torch.mul({x}, {x}.sigmoid())",
            ),
            methods=("{x}.mul({x}.sigmoid())",),
            overwriting_methods=("{x}.mul_({x}.sigmoid())",),
            overwriting_saves="nothing",
        ),
        _rectifier(
            "mish",
            "F.mish",
            modules=("nn.Mish()",),
            functions=("F.mish({x})",),
            overwriting_modules=("nn.Mish(inplace=True)",),
            overwriting_functions=("F.mish({x}, inplace=True)",),
            overwriting_saves="nothing",
        ),
        _rectifier(
            "softplus",
            "lambda t: F.softplus(t, beta=2)",
            modules=("nn.Softplus(beta=2)",),
            functions=("F.softplus({x}, beta=2)",),
        ),
        _rectifier(
            "hardswish",
            "F.hardswish",
            modules=("nn.Hardswish()",),
            functions=("F.hardswish({x})",),
            overwriting_modules=("nn.Hardswish(inplace=True)",),
            overwriting_functions=("F.hardswish({x}, inplace=True)",),
            overwriting_saves="nothing",
        ),
        _rectifier(
            "clamp",
            "lambda t: t.clamp(min=0)",
            functions=(
                "torch.clamp({x}, min=0)",
                "torch.clip({x}, 0.0)",
                "torch.clamp({x}, min={x}.new_zeros(()))",
            ),
            methods=("{x}.clamp(min=0.0)", "{x}.clamp(0)"),
            overwriting_functions=("torch.clamp_({x}, min=0)",),
            overwriting_methods=("{x}.clamp_(min=0)", "{x}.clamp_(0.0)"),
            overwriting_saves="nothing",
        ),
        _rectifier(
            "clamp_bounded",
            "lambda t: t.clamp(0, 1.5)",
            functions=("torch.clamp({x}, 0, 1.5)",),
            methods=("{x}.clamp(min=0, max=1.5)",),
            overwriting_methods=("{x}.clamp_(0, 1.5)",),
            overwriting_saves="nothing",
        ),
        _rectifier(
            "clamp_min",
            "lambda t: t.clamp(min=0)",
            functions=("torch.clamp_min({x}, 0)",),
            methods=("{x}.clamp_min(0)",),
            overwriting_functions=("torch.clamp_min_({x}, 0)",),
            overwriting_methods=("{x}.clamp_min_(0)",),
            overwriting_saves="nothing",
        ),
        _rectifier(
            "hardtanh",
            "lambda t: F.hardtanh(t, 0.0, 2.0)",
            modules=("nn.Hardtanh(0.0, 2.0)",),
            functions=("F.hardtanh({x}, 0.0, 2.0)",),
            overwriting_modules=("nn.Hardtanh(0.0, 2.0, inplace=True)",),
            overwriting_functions=("F.hardtanh_({x}, 0.0, 2.0)",),
        ),
        _rectifier(
            "threshold",
            "lambda t: F.threshold(t, 0.0, 0.0)",
            modules=("nn.Threshold(0.0, 0.0)",),
            functions=("F.threshold({x}, 0.0, 0.0)",),
            overwriting_modules=("nn.Threshold(0.0, 0.0, inplace=True)",),
            overwriting_functions=("F.threshold_({x}, 0.0, 0.0)",),
        ),
        _rectifier(
            "maximum",
            "F.relu",
            functions=(
                "torch.maximum({x}, torch.zeros_like({x}))",
                "torch.maximum({x}, {x}.new_zeros(()))",
                "torch.max({x}, torch.zeros_like({x}))",
                "torch.maximum(torch.zeros_like({x}), {x})",
            ),
            methods=("{x}.maximum({x}.new_zeros(1))",),
        ),
        _rectifier(
            "relu_by_hand",
            "F.relu",
            functions=(
                "{x} * ({x} > 0)",
                "{x} * ({x} > 0).to({x})",
                "{x} * ({x} >= 0).float()",
                "torch.mul({x}.gt(0), {x})",
                "{x} * ~({x} < 0)",
                "torch.masked_fill({x}, {x} <= 0, 0.0)",
            ),
            methods=("{x}.masked_fill({x} < 0, 0)", "{x}.mul({x} > 0)"),
            overwriting_functions=("{x}[{x} < 0] = 0", "{x}[{x} <= 0] = {x}.new_zeros(())"),
            overwriting_methods=("{x}.masked_fill_({x} < 0, 0)", "{x}.mul_({x} > 0)"),
            saves="nothing",
            overwriting_saves="nothing",
        ),
        _rectifier(
            "where",
            "F.relu",
            functions=(
                "torch.where({x} > 0, {x}, 0.0)",
                "torch.where({x} > 0, {x}, torch.zeros_like({x}))",
            ),
            methods=("{x}.where({x} > 0, torch.zeros_like({x}))",),
            saves="nothing",
        ),
    )
}

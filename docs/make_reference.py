"""Writes reference.md from the docstrings of the public names.

Run as ``python docs/make_reference.py``; a test fails while the page is not up to date.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "reference.md"

PUBLIC = {
    "Reconstructing": {
        "lit_deconv.attr": ["Deconvnet"],
        "lit_deconv.explain": ["Explanation", "Step"],
        "lit_deconv.engine.geometry": ["ReceptiveField"],
    },
    "While training": {"lit_deconv.callbacks.deconv": ["DeconvCallback"]},
    "In Captum's place": {"lit_deconv.drop_in": ["Deconvolution", "NeuronDeconvolution"]},
    "Beside Captum": {
        "lit_deconv.compare": [
            "agreement",
            "Agreement",
            "captum_attribution",
            "captum_deconvolution",
            "captum_neuron",
            "unit_selector",
            "unnoticed",
        ]
    },
    "Choosing layers": {"lit_deconv.layers": ["resolve", "automatic", "UnknownLayerError"]},
    "Strongest activations over a data set": {
        "lit_deconv.top": [
            "collect_top",
            "TopActivations",
            "LayerTop",
            "reconstruct_top",
            "TopReconstructions",
            "estimate",
        ]
    },
    "Pictures": {
        "lit_deconv.render": [
            "Look",
            "Heading",
            "channel_grid",
            "figure2",
            "figure4",
            "filters",
            "side_by_side",
            "enhance",
            "photograph",
            "show",
        ]
    },
    "Loggers": {"lit_deconv.sinks": ["sink", "Sink", "Picture"]},
    "Rules": {"lit_deconv.engine": ["reverse_rule"], "lit_deconv.engine.registry": ["Rule"]},
    "Errors": {
        "lit_deconv.engine": [
            "DeconvError",
            "InputError",
            "LayerError",
            "SelectorError",
            "UnsupportedOp",
            "AmbiguousProduct",
        ]
    },
}
"""What the page holds, by heading and module."""

SECTIONS = "Args|Attributes|Returns|Raises|Yields|Examples?|Note"


def main() -> None:
    """Write the page."""
    PAGE.write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The page in Markdown."""
    parts = ["# Reference", "Made from the docstrings by `python docs/make_reference.py`."]
    for heading, modules in PUBLIC.items():
        parts.append(f"## {heading}")
        for module, names in modules.items():
            for name in names:
                parts += entry(name, getattr(import_module(module), name))
    return "\n\n".join(parts) + "\n"


def entry(name: str, thing: Any) -> Iterator[str]:
    """A class with its public methods, or a function."""
    shown = thing.__module__.removesuffix(".deconv")
    for public in ("lit_deconv", shown.rpartition(".")[0]):
        if getattr(import_module(public), name, None) is thing:
            shown = public
            break
    plain = issubclass(thing, Exception) if inspect.isclass(thing) else False
    signature = "" if plain else headline(thing)
    yield f"### {name}"
    yield f"```python\nfrom {shown} import {name}\n{name}{signature}\n```".replace(
        f"\n{name}\n", "\n"
    )
    yield text(thing)
    for method, function in methods(thing):
        yield f"#### {name}.{method}"
        yield f"```python\n{method}{headline(function)}\n```"
        yield text(function)


def methods(thing: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Methods that the class itself documents, but for those that Lightning calls."""
    if not inspect.isclass(thing):
        return
    for name, member in vars(thing).items():
        called = name.startswith(("_", "on_")) or name in ("setup", "teardown")
        function = inspect.unwrap(member) if inspect.isfunction(member) else None
        if function is not None and not called and function.__doc__:
            yield name, function


def headline(thing: Any) -> str:
    """The signature as it is written in the source: annotations print alike on every Python."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    if inspect.isclass(thing) and (is_dataclass(thing) or is_protocol(thing)):
        return fields(thing) if is_dataclass(thing) else ""
    source = inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(function)))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    arguments = [argument for argument in spelled(node.args) if argument != "self"]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and function is thing else ""
    line = f"({', '.join(arguments)}){returns}"
    if len(line) <= 90:
        return line
    return "(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){returns}"


def is_protocol(thing: Any) -> bool:
    """Whether a class says what others must look like."""
    return getattr(thing, "_is_protocol", False)


def fields(cls: type) -> str:
    """The arguments of a dataclass."""
    node = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body[0]
    assert isinstance(node, ast.ClassDef)
    found = [
        ast.unparse(line)
        for line in node.body
        if isinstance(line, ast.AnnAssign) and not ast.unparse(line.target).startswith("_")
    ]
    line = f"({', '.join(found)})"
    return line if len(line) <= 90 else "(\n" + "".join(f"    {f},\n" for f in found) + ")"


def spelled(arguments: ast.arguments) -> Iterator[str]:
    """Each argument with annotation and default; the bare star where names begin."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults))
    for argument, default in zip(plain, [*defaults, *arguments.defaults], strict=True):
        yield one(argument, default)
    if arguments.vararg:
        yield f"*{one(arguments.vararg, None)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield one(argument, default)
    if arguments.kwarg:
        yield f"**{one(arguments.kwarg, None)}"


def one(argument: ast.arg, default: ast.expr | None) -> str:
    """An argument as the source writes it."""
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    if default is None:
        return f"{argument.arg}{kind}"
    return f"{argument.arg}{kind}{' = ' if kind else '='}{ast.unparse(default)}"


def text(thing: Any) -> str:
    """A Google-style docstring as Markdown: its sections become lists."""
    parts = []
    blocks = re.split(rf"^({SECTIONS})::?\n", inspect.getdoc(thing) or "", flags=re.M)
    parts.append(blocks[0].strip())
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        indented, rest = split_section(body)
        if title.startswith("Example"):
            parts.append(f"**{title}**\n\n```python\n{inspect.cleandoc(indented)}\n```")
        elif title in ("Args", "Attributes", "Raises"):
            items = re.sub(r"^(\*{0,2}[\w.]+)( \([^)]*\))?: ", r"- `\1`\2: ", indented, flags=re.M)
            parts.append(f"**{title}**\n\n{items}")
        else:
            parts.append(f"**{title}**: {indented}")
        parts.append(rest)
    return "\n\n".join(part for part in parts if part)


def split_section(body: str) -> tuple[str, str]:
    """What is indented below a section's title, and what comes after it."""
    lines = body.split("\n")
    end = next((i for i, line in enumerate(lines) if line and line[0] != " "), len(lines))
    indented = inspect.cleandoc("\n" + "\n".join(lines[:end]))
    return indented, "\n".join(lines[end:]).strip()


if __name__ == "__main__":
    main()

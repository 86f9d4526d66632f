"""The `lit-deconv` command: chooses a subcommand, and imports nothing heavy before it is chosen.

Exit codes: 0 done, 1 a run that was interrupted, 2 wrong use or a failure, told in one line on
standard error; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import sys
from argparse import Action
from argparse import ArgumentParser as BaseParser
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentError, ArgumentParser

from lit_deconv.version import __version__

COMMANDS = {
    "attribute": "reconstruct what activates the layers of a model in pictures of yours",
    "top": "find what activates each channel most in a whole data set, and reconstruct it",
    "layers": "list the layers of a model: shapes, receptive fields, what can be looked at",
    "demo": "train a small network on generated pictures and watch its layers in TensorBoard",
}
"""Subcommands of our own, each a module of that name in `lit_deconv.commands`."""

LIGHTNING_COMMANDS = {
    "fit": "train a LightningModule from YAML, with DeconvCallback among its callbacks",
    "validate": "one validation epoch of a LightningModule from YAML",
    "test": "one test epoch of a LightningModule from YAML",
}
"""Subcommands that Lightning's own command line parses and runs."""

SHELLS = ("bash", "zsh", "tcsh")
"""That completion is there for."""

EPILOG = """
Start with `lit-deconv demo`. Your own pictures, in a folder with train/CLASS and val/CLASS:
`lit-deconv fit --config lit_deconv:imagefolder --data.root DIR`.
`lit-deconv COMMAND --help` explains a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: what follows the program's name; None takes it from the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        _run(words)
    except KeyboardInterrupt:
        print("lit-deconv: interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"lit-deconv: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> ArgumentParser:
    """Build the parser of all subcommands; those of Lightning appear in it by name only."""
    parser = _parser("See, in pixels, what a network learns while it learns.", EPILOG)
    parser.prog = "lit-deconv"
    parser.add_argument("--version", action="version", version=f"lit-deconv {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
    parser.add_argument(
        "--print_completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print what makes a shell complete this command, to source or save; needs shtab",
    )
    subcommands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = _parser(f"{summary[0].upper()}{summary[1:]}.")
        import_module(f"lit_deconv.commands.{name}").add_arguments(subparser)
        subcommands.add_subcommand(name, subparser, help=summary)
    for name, summary in LIGHTNING_COMMANDS.items():
        subcommands.add_subcommand(name, _parser(summary), help=summary)
    return parser


class _PrintCompletion(Action):
    """Prints the script that completes subcommands and options, then ends."""

    def __call__(
        self, parser: BaseParser, namespace: object, values: object, option: str | None = None
    ) -> None:
        try:
            from shtab import complete
        except ImportError as error:
            raise ImportError(
                f"{option} needs the package shtab: pip install 'lit-deconv[completion]'"
            ) from error
        print(complete(parser, str(values)))
        parser.exit(0)


def _run(words: list[str]) -> None:
    if words and words[0] in LIGHTNING_COMMANDS:
        import_module("lit_deconv.commands.lightning").run(words)
        return
    options = build_parser().parse_args(words or ["--help"])
    import_module(f"lit_deconv.commands.{options.command}").run(options[options.command])


def _parser(description: str, epilog: str | None = None) -> ArgumentParser:
    return ArgumentParser(
        description=description, epilog=epilog, exit_on_error=False, allow_abbrev=False
    )


def _one_line(error: Exception) -> str:
    """What went wrong, without line breaks; the type where the words alone would not say it."""
    words = " ".join(str(error).split())
    if isinstance(error, ArgumentError | ValueError | OSError | ImportError) and words:
        return words
    return f"{type(error).__name__}: {words} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())

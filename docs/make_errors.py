"""Writes errors.md: what wrong input prints, and the exit code, by running each command.

Run as ``python docs/make_errors.py``; a test fails while the page is not up to date.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).parent / "errors.md"

MODULE = """
import torch
from torch import nn
from lightning.pytorch import LightningDataModule, LightningModule


def build(width=6):
    return nn.Sequential(
        nn.Conv2d(3, width, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(width, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )


def number():
    return 3


def stopping():
    class Stopping(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build()

        def forward(self, images):
            if bool(images.any()):  # no blank one, as those that are shown first, for the sizes
                raise KeyboardInterrupt
            return self.net(images)

    return Stopping()


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build()


class Streamed(LightningDataModule):
    def val_dataloader(self):
        return [1, 2]
"""

MODEL = "--model nets:build --size 40 --mean 0.5 --std 0.25"

CASES = {
    "Pictures": [
        "attribute nowhere.png --model nets:build",
        "attribute 'pictures/*.gif' --model nets:build",
        "attribute empty --model nets:build",
        "attribute text.png --model nets:build",
        f"attribute pictures text.png {MODEL} --layers 4 --output skipping",
        f"top pictures text.png {MODEL} --layers 4 --output top-skipping",
        "top --model nets:build",
    ],
    "Models": [
        "attribute pictures",
        "attribute pictures --model resnet81",
        "attribute pictures --model resnet18 --weights BEST",
        "attribute pictures --model nest:build",
        "attribute pictures --model nets:bild",
        "attribute pictures --model nets:number",
        "attribute pictures --model nets:build --model-args '{\"depth\": 3}'",
        "layers --model resnet81",
    ],
    "Checkpoints and weights": [
        "attribute pictures --model nets:build --state-dict none.pt",
        "attribute pictures --model nets:build --state-dict few.pt",
        "attribute pictures --model nets:build --state-dict shape.pt",
        "attribute pictures --model nets:build --state-dict code.pt",
        "attribute pictures --checkpoint few.pt",
        "attribute pictures --checkpoint few.pt --class nets.Net",
        "attribute pictures --checkpoint other.ckpt --class nets.Net",
    ],
    "Layers, channels, seeds": [
        f"attribute pictures {MODEL} --layers 9",
        f"attribute pictures {MODEL} --layers 'x*'",
        f"attribute pictures {MODEL} --layers 7",
        f"attribute pictures {MODEL} --channels 1,77",
        f"attribute pictures {MODEL} --seed 1,99,0 --layers 4",
        f"attribute pictures {MODEL} --seed everything",
        f"attribute pictures {MODEL} --compare NeuronDeconvolusion",
    ],
    "Sizes, normalisation, devices": [
        "attribute pictures --model nets:build --size big",
        "attribute pictures --model nets:build --mean 0.5",
        "attribute pictures --model nets:build --mean 1,2 --std 1,2",
        f"attribute pictures {MODEL} --device cuda",
        f"attribute pictures {MODEL} --device gpu",
    ],
    "Output": [
        f"attribute pictures {MODEL} --output full",
        f"attribute pictures {MODEL} --output a_file",
        f"attribute pictures {MODEL} --output a_file/in",
        f"top pictures {MODEL} --raw int8",
    ],
    "Data modules": [
        "top --datamodule nets.Date --model nets:build",
        "top --datamodule nets.Net --model nets:build",
        "top --datamodule nets.Streamed --model nets:build",
    ],
    "Interrupted": [
        "attribute pictures --model nets:stopping --size 40 --layers net.4 --output stopped",
        "top pictures --model nets:stopping --size 40 --layers net.4 --output top-stopped",
    ],
    "Configs": [
        "fit --config lit_deconv:imagenet",
    ],
}

HEAD = """# What goes wrong, and what it says

Made by `python docs/make_errors.py`, which runs each command in a folder with a few pictures and a
small model `nets:build`; a test runs it again. Wrong use and failures take one line on standard error,
with what was given, what was expected and what to do. Exit codes: 0 done; 1 interrupted, what is
finished stays; 2 wrong use or a failure. `--debug` shows the traceback.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page in Markdown."""
    parts = [HEAD]
    with prepared():
        for heading, commands in CASES.items():
            parts.append(
                f"## {heading}\n\n| `lit-deconv ...` | Exit code | Standard error |\n|---|---|---|"
            )
            parts += [row(command) for command in commands]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def row(command: str) -> str:
    """A row of the table."""
    code, said = outcome(command)
    lines = "<br>".join(cell(line) for line in said.splitlines())
    return f"| `{command}` | {code} | {lines} |"


def outcome(command: str) -> tuple[int, str]:
    """Exit code and standard error of a command, without what other libraries' versions word."""
    from lit_deconv.cli import main as lit_deconv

    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = lit_deconv(shlex.split(command))
    said = re.sub(r"\d+ channels, \d+ units\. Memory .*\n", "", error.getvalue())
    return code, said.replace(f"{os.path.realpath(os.getcwd())}{os.sep}", "")


def cell(text: str) -> str:
    """A line as a cell of a Markdown table holds it."""
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


@contextlib.contextmanager
def prepared() -> Iterator[None]:
    """A folder with what the commands name; no GPU."""
    import torch
    from PIL import Image

    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, ("it-ran",)

    before, path = os.getcwd(), list(sys.path)
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch("torch.cuda.is_available", return_value=False),
    ):
        os.chdir(name)
        sys.modules.pop("nets", None)
        try:
            for folder in ("pictures", "empty", "full"):
                Path(folder).mkdir()
            Path("nets.py").write_text(MODULE)
            Path("full/thesis.txt").write_text("years")
            Path("a_file").write_text("no folder")
            Path("text.png").write_text("no picture")
            for number in range(2):
                Image.new("RGB", (40, 40), (80 * number, 90, 200)).save(f"pictures/{number}.png")
            torch.save({"0.weight": torch.zeros(6, 3, 5, 5), "other": torch.zeros(1)}, "few.pt")
            torch.save({"0.weight": torch.zeros(7, 3, 5, 5)}, "shape.pt")
            torch.save({"weights": Code()}, "code.pt")
            weights = {"net.0.weight": torch.zeros(6, 3, 5, 5), "head.weight": torch.zeros(1)}
            torch.save({"state_dict": weights, "pytorch-lightning_version": "2.5.0"}, "other.ckpt")
            yield
            assert not Path("it-ran").exists()
        finally:
            os.chdir(before)
            sys.path[:] = path
            sys.modules.pop("nets", None)


if __name__ == "__main__":
    main()

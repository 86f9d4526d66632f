"""How to look at a log folder: the command to type, as short as it works here."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

EVERY_STEP = ("--samples_per_plugin", "images=1000000")
"""Flags that keep the pictures of every step, where TensorBoard would keep ten of a tag.

A large number, because `images=0`, which once meant all, shows none (tensorboard issue 5550).
"""


def tensorboard_command(log_dir: str) -> str:
    """Write the command that opens `log_dir` and keeps the pictures of every step.

    TensorBoard is named by its path unless typing `tensorboard` finds the one beside this Python.
    """
    beside = Path(sys.executable).parent / "tensorboard"
    on_path = shutil.which("tensorboard")
    if on_path is not None and Path(on_path).parent == beside.parent:
        program = ["tensorboard"]
    elif beside.exists():
        program = [relative(str(beside))]
    else:
        program = [sys.executable, "-m", "tensorboard.main"]
    return shlex.join([*program, "--logdir", relative(log_dir), *EVERY_STEP])


def relative(path: str) -> str:
    """`path` as seen from the current folder where it lies inside, as it is elsewhere."""
    from_here = os.path.relpath(path)
    return path if from_here.startswith(os.pardir) else from_here

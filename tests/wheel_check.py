"""Builds the wheel, installs it into an environment of its own and reads it from another folder.

In the working tree `callbacks/` and `configs/` lie beside the package, so only the wheel shows what
a user gets. Run it with the Python that has the dependencies and mypy: `make wheel-check`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = (".*", "build", "dist", "*.egg-info", "__pycache__", "logs", "lightning_logs", "data")

USER_SCRIPT = """
import torch
from torch import Tensor, nn
from lightning.pytorch import Trainer
from lit_deconv import Deconvnet, Deconvolution, NeuronDeconvolution
from lit_deconv.callbacks import DeconvCallback

trainer = Trainer(callbacks=[DeconvCallback()])
net = Deconvnet(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), "1")
"""

WRONG_SCRIPT = """
from lit_deconv.callbacks import DeconvCallback

DeconvCallback(no_such_argument=1)
"""

LOOK_AROUND = """
from importlib.resources import files
import sys

import lit_deconv.callbacks
from lit_deconv.callbacks import DeconvCallback
from lit_deconv import Deconvnet, Deconvolution, NeuronDeconvolution

home = sys.argv[1]
for module in (lit_deconv, lit_deconv.callbacks):
    assert module.__file__.startswith(home), f"{module.__file__} is not in {home}"
for config in files("lit_deconv.configs").iterdir():
    assert str(config).startswith(home), config
"""


def main() -> None:
    """Build, read, install, import and type-check."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        wheel = build(work)
        read(wheel)
        python = install(wheel, work / "env")
        elsewhere = work / "elsewhere"
        elsewhere.mkdir()
        run(python, "-I", "-c", LOOK_AROUND, str(work / "env"), cwd=elsewhere)
        run(python.with_name("lit-deconv"), "--version", cwd=elsewhere)
        type_check(python, elsewhere)
    print("wheel check passed")


def build(work: Path) -> Path:
    """Build from a copy, because setuptools packs what an earlier build left in `build/`."""
    shutil.copytree(ROOT, work / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", work, work / "source")
    (wheel,) = work.glob("lit_deconv-*.whl")
    return wheel


def read(wheel: Path) -> None:
    """Assert that all that belongs to the package is in the wheel, and nothing beside it."""
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    packages = {name for name in top if not name.endswith(".dist-info")}
    assert packages == {"lit_deconv"}, f"top-level names in the wheel: {sorted(packages)}"
    expected = {"lit_deconv/py.typed"}
    for folder, home in (
        ("lit_deconv", ""),
        ("callbacks", "lit_deconv/"),
        ("configs", "lit_deconv/"),
    ):
        for suffix in ("py", "yaml", "html"):
            found = (ROOT / folder).rglob(f"*.{suffix}")
            expected |= {home + path.relative_to(ROOT).as_posix() for path in found}
    assert any(name.endswith(".yaml") for name in expected), "there are no configs to pack"
    packed = {name for name in names if name.startswith("lit_deconv/")}
    assert packed == expected, (
        f"not in the wheel (is its package in pyproject.toml?): {sorted(expected - packed)}; "
        f"in the wheel only: {sorted(packed - expected)}"
    )
    assert any(name.endswith("licenses/LICENSE") for name in names), "no licence in the wheel"
    print(f"{wheel.name}: {len(packed)} files, all of them ours")


def install(wheel: Path, folder: Path) -> Path:
    """Install into a new environment that sees the dependencies of this one.

    A path in a .pth file adds the packages of this environment, but not its .pth files in turn, so
    the editable install stays out of sight.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "lib" / version / "site-packages"
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "-q", "--no-deps", "--force-reinstall", "--prefix", folder, wheel)
    return python


def type_check(python: Path, folder: Path) -> None:
    """Assert that a type checker finds the package's types, and finds fault by them."""
    mypy = (sys.executable, "-m", "mypy", "--strict", "--python-executable", python)
    (folder / "user.py").write_text(USER_SCRIPT)
    run(*mypy, "user.py", cwd=folder)
    (folder / "wrong.py").write_text(WRONG_SCRIPT)
    wrong = subprocess.run([*mypy, "wrong.py"], cwd=folder, text=True, stdout=subprocess.PIPE)
    assert "[call-arg]" in wrong.stdout, f"mypy did not see the types:\n{wrong.stdout}"


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a command, which must succeed."""
    subprocess.run([str(word) for word in command], cwd=cwd, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main()

"""What `import lit_deconv` gives, and what it does not cost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_deconv
from lit_deconv import version

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch", "torchvision", "lightning", "pytorch_lightning", "tensorboard", "captum", "numpy",
    "torchmetrics",
)  # fmt: skip


def heavy_modules_after(code: str, folder: Path) -> set[str]:
    """Top-level names of heavy modules that `code` makes a fresh Python import."""
    report = "; import json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        cwd=folder,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    return set(HEAVY) & set(json.loads(done.stdout.splitlines()[-1]))


def test_import_imports_nothing_heavy(tmp_path: Path) -> None:
    assert heavy_modules_after("import lit_deconv", tmp_path) == set()


def test_heavy_modules_would_be_noticed(tmp_path: Path) -> None:
    assert "torch" in heavy_modules_after("import lit_deconv, torch", tmp_path)


def test_what_one_process_needs_is_light(tmp_path: Path) -> None:
    code = "from lit_deconv import Deconvnet, Deconvolution, NeuronDeconvolution; import lit_deconv.top"
    unwanted = {"lightning", "pytorch_lightning", "tensorboard", "torchmetrics"}
    assert heavy_modules_after(code, tmp_path) & unwanted == set()


def test_every_public_name_is_there() -> None:
    for name in lit_deconv.__all__:
        assert name in dir(lit_deconv)
        assert getattr(lit_deconv, name).__name__ == name if name != "__version__" else True
    assert lit_deconv.__version__ == version.__version__


def test_a_name_that_is_not_there_is_said() -> None:
    with pytest.raises(AttributeError, match="module 'lit_deconv' has no attribute 'Deconvnett'"):
        lit_deconv.Deconvnett  # noqa: B018


@pytest.mark.parametrize("folder", ["lit_deconv", "callbacks", "configs"])
def test_every_package_is_named_in_pyproject(folder: str) -> None:
    """The list is written by hand: a package that is missing from it is missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r"^packages = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    named = set(re.findall(r'"([\w.]+)"', found.group(1)))
    there = {path.parent.relative_to(ROOT) for path in (ROOT / folder).rglob("__init__.py")}
    prefix = "" if folder == "lit_deconv" else "lit_deconv."
    assert {prefix + ".".join(path.parts) for path in there} <= named

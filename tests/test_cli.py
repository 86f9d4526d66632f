"""The command line: its help costs nothing, its errors take one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from lit_deconv import __version__
from lit_deconv.cli import COMMANDS, LIGHTNING_COMMANDS, build_parser, main
from lit_deconv.commands import tensorboard
from lit_deconv.commands.lightning import packaged_configs
from lit_deconv.commands.tensorboard import tensorboard_command

BORING = """
trainer: {max_epochs: 1, limit_train_batches: 2, limit_val_batches: 1, limit_test_batches: 1,
          accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}
data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arguments", [["--help"], [], ["demo", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_lightning(arguments: list[str]) -> None:
    code = (
        "import json, sys\n"
        "from lit_deconv.cli import main\n"
        "try:\n"
        "    main(json.loads(sys.argv[1]))\n"
        "except SystemExit:\n"
        "    pass\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    *said, modules = done.stdout.splitlines()
    assert said
    assert {"torch", "lightning", "numpy", "tensorboard"} & set(json.loads(modules)) == set()


def test_help_names_every_subcommand() -> None:
    text = build_parser().format_help()
    for name in (*COMMANDS, *LIGHTNING_COMMANDS):
        assert f"\n    {name} " in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"lit-deconv {__version__}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dmeo"], "dmeo"),
        (["demo", "--smal"], "--smal"),
        (["demo", "--max_epochs", "many"], "max_epochs"),
        (["demo", "--max_epochs", "0"], "max_epochs"),
        (["fit", "--config", "lit_deconv:nothing"], "imagefolder"),
        (["fit", "--config=lit_deconv:nothing"], "imagefolder"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["fit", "--model", "no.such.Model"], "no.such.Model"),
        (["fit", "--trainer.nothing", "3"], "--trainer.nothing"),
    ],
)
def test_wrong_use_takes_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("lit-deconv: ")
    assert said in error
    assert "\n" not in error


def test_a_failure_in_training_takes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("boring.yaml").write_text(BORING)
    code = main(["fit", "--config", "boring.yaml", "--ckpt_path", "nowhere.ckpt"])
    assert code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("lit-deconv: ")
    assert "nowhere.ckpt" in last


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="no packaged config is named 'nothing'"):
        main(["fit", "--config", "lit_deconv:nothing", "--debug"])


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_lightning_runs_what_the_yaml_says(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lit-deconv", "untouched"])
    Path("boring.yaml").write_text(BORING)
    assert main([command, "--config", "boring.yaml"]) == 0
    assert sys.argv == ["lit-deconv", "untouched"]
    said = capsys.readouterr().out
    folder = Path("lightning_logs", "version_0")
    assert f"log folder: {folder}\n" in said
    assert f"--logdir {folder} " in said
    assert folder.is_dir()


def test_a_packaged_config_goes_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"imagefolder", "cifar10", "demo"} <= set(packaged_configs())
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "lit_deconv:demo", "--print_config"])
    printed = capsys.readouterr().out
    assert "lit_deconv.callbacks.DeconvCallback" in printed
    assert "lit_deconv.examples" in printed


def test_demo_ends_with_accuracy_folder_and_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--small", "--output", "here"]) == 0
    said = capsys.readouterr()
    accuracy, folder, command = said.out.strip().splitlines()[-3:]
    assert 0 <= float(accuracy.removeprefix("validation accuracy: ").removesuffix("%")) <= 100
    log = Path(folder.removeprefix("log folder: "))
    assert log == Path("here", "demo", "version_0")
    assert command.endswith(f"--logdir {log} --samples_per_plugin images=1000000")
    reader = EventMultiplexer().AddRunsFromDirectory(str(log))
    reader.Reload()
    (kinds,) = reader.Runs().values()
    assert "val_acc" in kinds["scalars"]
    assert kinds["images"]


def test_tensorboard_goes_by_its_name_only_where_that_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = tmp_path / ".venv" / "bin", tmp_path / "other"
    for folder in (ours, other):
        folder.mkdir(parents=True)
        (folder / "tensorboard").write_text("#!/bin/sh\n")
        (folder / "tensorboard").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(ours / "python"))
    flags = "--logdir 'my logs' --samples_per_plugin images=1000000"

    monkeypatch.setenv("PATH", str(ours))
    assert tensorboard_command("my logs") == f"tensorboard {flags}"
    monkeypatch.setenv("PATH", str(other))
    assert tensorboard_command("my logs") == f".venv/bin/tensorboard {flags}"
    (ours / "tensorboard").unlink()
    assert tensorboard_command("my logs") == f"{ours / 'python'} -m tensorboard.main {flags}"


def test_paths_are_relative_where_they_lie_inside(tmp_path: Path) -> None:
    assert tensorboard.relative(str(tmp_path / "logs")) == "logs"
    assert tensorboard.relative("/somewhere/else") == "/somewhere/else"

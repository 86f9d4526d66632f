"""Help teaches, states the exit codes, and waits for nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lit_deconv.cli import main

CODE = """
import json, sys
from lit_deconv.cli import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit:
    pass
print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))
"""


@pytest.mark.parametrize("words", [["attribute", "--help"], ["layers", "--help"], ["--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(words)],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    *said, modules = done.stdout.splitlines()
    assert len(said) > 10
    heavy = {"torch", "torchvision", "lightning", "numpy", "PIL", "captum", "tensorboard"}
    assert heavy & set(json.loads(modules)) == set()


@pytest.mark.parametrize("command", ["attribute", "layers"])
def test_help_states_exit_codes_and_gives_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines break there
    assert "Exit codes: 0 done; 1 interrupted" in said
    assert f"`lit-deconv {command} " in said

"""Help teaches, states the exit codes, and waits for nothing heavy."""

from __future__ import annotations

import json
import shutil
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


@pytest.mark.parametrize(
    "words", [["attribute", "--help"], ["top", "--help"], ["layers", "--help"], ["--help"]]
)
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


@pytest.mark.parametrize("command", ["attribute", "top", "layers"])
def test_help_states_exit_codes_and_gives_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # lines break there
    assert "Exit codes: 0 done; 1 interrupted" in said
    assert f"`lit-deconv {command} " in said


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_subcommands_and_options() -> None:
    pytest.importorskip("shtab")
    words = [sys.executable, "-m", "lit_deconv.cli", "--print_completion", "bash"]
    script = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    asked = """
    for words in "t" "top --da" "attribute --see"; do
        COMP_WORDS=(lit-deconv $words)
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        _shtab_lit_deconv
        echo "${COMPREPLY[@]}"
    done
    """
    done = subprocess.run(
        ["bash", "-c", script + asked], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["top test", "--datamodule --datamodule-args", "--seed"]


def test_completion_without_shtab_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print_completion", "zsh"]) == 2
    assert "pip install 'lit-deconv[completion]'" in capsys.readouterr().err

"""What a user can get wrong: one line that says what to do, exit code 2, nothing written over."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from lit_deconv.cli import main

MODEL = ["--model", "my_nets:build"]


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("it-ran",)


@pytest.fixture(autouse=True)
def bad_files(folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("years")
    (folder / "text.png").write_text("no picture")
    (folder / "a_file").write_text("no folder")
    (folder / "half.pt").write_bytes(b"PK\x03\x04 and no more")
    torch.save({"0.weight": torch.zeros(6, 3, 5, 5), "other": torch.zeros(1)}, "few.pt")
    torch.save({"0.weight": torch.zeros(7, 3, 5, 5)}, "shape.pt")
    weights = {"net.0.weight": torch.zeros(7, 3, 5, 5)}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.5.0"}, "shape.ckpt")
    torch.save({"weights": Code()}, "evil.pt")
    torch.save([1, 2], "list.pt")


CASES = [
    (["nowhere.png", *MODEL], "there is no file or folder nowhere.png"),
    (["pictures/*.gif", *MODEL], "nothing matches pictures/*.gif"),
    (["empty", *MODEL], "there is no picture in empty"),
    (["text.png", *MODEL], "none of the pictures could be read"),
    (["pictures"], "neither of --model and --checkpoint"),
    (["pictures", *MODEL, "--checkpoint", "few.pt", "--class", "my_nets.Net"], "both of --model"),
    (["pictures", "--model", "resnet81"], "nearest: resnet18"),
    (["pictures", "--model", "resnet18", "--weights", "BEST"], "IMAGENET1K_V1"),
    (["pictures", "--model", "my_nest:build"], "cannot import my_nest"),
    (["pictures", "--model", "my_nets:bild"], "nearest: build"),
    (["pictures", "--model", "my_nets:number"], "returned int, expected"),
    (["pictures", "--model", "my_nets:Pictures"], "returned Pictures"),
    (["pictures", *MODEL, "--layers", "9"], "no layer '9'"),
    (["pictures", *MODEL, "--layers", "x*"], "no layer matches 'x*'"),
    (["pictures", *MODEL, "--layers", "8"], "expected feature maps"),
    (["pictures", *MODEL, "--seed", "9"], "outside layer '1'"),
    (["pictures", *MODEL, "--layers", "5", "--seed", "1,99,0"], "outside layer '5'"),
    (["pictures", *MODEL, "--seed", "everything"], "--seed 'everything'"),
    (["pictures", *MODEL, "--channels", "1,77"], "no channel 77"),
    (["pictures", *MODEL, "--channels", "some"], "--channels 'some'"),
    (["pictures", *MODEL, "--channels", "0"], "at least one"),
    (["pictures", *MODEL, "--top-k", "0"], "top_k"),
    (["pictures", *MODEL, "--size", "big"], "--size 'big'"),
    (["pictures", *MODEL, "--size", "2"], "--size sets its size"),
    (["pictures", *MODEL, "--mean", "0.5"], "both --mean and --std"),
    (["pictures", *MODEL, "--mean", "a", "--std", "b"], "--mean 'a'"),
    (["pictures", *MODEL, "--mean", "1,2", "--std", "1,2"], "2 values for 3 channels"),
    (["pictures", *MODEL, "--mean", "0", "--std", "0"], "positive"),
    (["pictures", *MODEL, "--device", "gpu"], "--device 'gpu'"),
    (["pictures", *MODEL, "--compare", "NeuronDeconvolusion"], "NeuronDeconvolution"),
    (["pictures", *MODEL, "--datamodule", "my_nets.Date"], "no 'Date'; nearest: Data"),
    (["pictures", *MODEL, "--output", "full"], "full is not empty (it holds thesis.txt)"),
    (["pictures", *MODEL, "--output", "a_file"], "a_file is a file"),
    (["pictures", *MODEL, "--output", "a_file/in"], "cannot write to --output a_file/in"),
    (["pictures", *MODEL, "--state-dict", "none.pt"], "there is no file none.pt"),
    (["pictures", *MODEL, "--state-dict", "half.pt"], "half.pt"),
    (["pictures", *MODEL, "--state-dict", "text.png"], "no file that torch.save wrote"),
    (["pictures", *MODEL, "--state-dict", "list.pt"], "holds a list"),
    (["pictures", *MODEL, "--state-dict", "few.pt"], "missing: 0.bias, 3.weight"),
    (["pictures", *MODEL, "--state-dict", "few.pt"], "unexpected: other"),
    (["pictures", *MODEL, "--state-dict", "shape.pt"], "0.weight [7, 3, 5, 5] for [6, 3, 5, 5]"),
    (["pictures", *MODEL, "--state-dict", "evil.pt"], "--unsafe-load"),
    (["pictures", "--checkpoint", "few.pt"], "belong together"),
    (["pictures", "--checkpoint", "few.pt", "--class", "my_nets.Net"], "no Lightning checkpoint"),
    (["pictures", "--checkpoint", "no.ckpt", "--class", "my_nets.Net"], "no file no.ckpt"),
    (
        ["pictures", "--checkpoint", "shape.ckpt", "--class", "my_nets.Pictures"],
        "no LightningModule",
    ),
    (["pictures", "--checkpoint", "shape.ckpt", "--class", "my_nets.Net"], "net.0.weight"),
    (["pictures", *MODEL, "--model-args", '{"depth": 3}'], "'depth'; its arguments go into"),
    (["pictures", *MODEL, "--everything"], "--everything"),
    ([], "images"),
]


@pytest.mark.parametrize(("words", "said"), CASES, ids=[" ".join(words) for words, _ in CASES])
def test_one_line_and_exit_code_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attribute", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *before, last = printed.err.strip().splitlines()
    assert last.startswith("lit-deconv: ")
    assert said in last
    assert all(line.startswith(("skipped", "size:")) for line in before)
    assert not Path("it-ran").exists()
    assert not Path("attributions").exists() or not list(Path("attributions").iterdir())


def test_no_gpu_where_one_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["attribute", "pictures", *MODEL, "--device", "cuda"]) == 2
    assert "torch finds 0 GPUs here; use --device cpu" in capsys.readouterr().err


def test_unreadable_pictures_are_named_skipped_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = Path("pictures/1.png").read_bytes()
    Path("pictures/half.png").write_bytes(whole[: len(whole) // 2])
    Path("pictures/none.jpg").touch()
    assert main(["attribute", "pictures", *MODEL, "--layers", "5", "--batch-size", "2"]) == 0
    printed = capsys.readouterr()
    assert "skipped pictures/half.png" in printed.err
    assert "skipped pictures/none.jpg" in printed.err
    assert "skipped: 2 of 7 pictures" in printed.out


def test_nothing_is_overwritten_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["attribute", "pictures", *MODEL, "--layers", "5"]
    assert main(words) == 0
    before = {p: p.stat().st_mtime_ns for p in Path("attributions").rglob("*") if p.is_file()}
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert main([*words, "--force"]) == 0
    assert len(list(Path("attributions/tensorboard").iterdir())) == 1


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").chmod(0o500)
    assert main(["attribute", "pictures", *MODEL, "--output", "empty"]) == 2
    assert "cannot write to --output empty" in capsys.readouterr().err


def test_code_runs_only_where_the_user_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["attribute", "pictures", *MODEL, "--state-dict", "evil.pt"]
    assert main([*words, "--unsafe-load"]) == 2  # the keys still do not fit
    assert Path("it-ran").exists()
    assert "missing" in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["attribute", "nowhere.png", *MODEL, "--debug"])

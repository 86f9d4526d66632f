"""`lit-deconv top`: what it writes is what a plain search finds, in one pass, stopped or not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lit_deconv import Deconvnet
from lit_deconv.cli import main
from lit_deconv.commands import looking, strongest, top_pages, top_plan
from lit_deconv.commands.models import imported
from lit_deconv.commands.pictures import View

VIEW = View((40, 40), None, (0.5,), (0.25,))
FILES = ["pictures", "--model", "my_nets:build", "--mean", "0.5", "--std", "0.25"]
DATA = ["--datamodule", "my_nets.Data", "--model", "my_nets:build"]
WANTED = ["--layers", "1,5", "--channels", "all", "--top-k", "3", "--batch-size", "2"]


def top(*words: str) -> dict[str, Any]:
    assert main(["top", *words]) == 0
    return index()


def index(folder: str = "top") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "index.json").read_text())
    assert found["complete"]
    return found


def units(layer: str, folder: str = "top") -> list[dict[str, Any]]:
    files = index(folder)["layers"][layer]["files"]
    return [unit for file in files for unit in json.loads(Path(folder, file).read_text())]


def reconstructions(layer: str, folder: str = "top") -> Iterator[tuple[dict[str, Any], Tensor]]:
    for unit in units(layer, folder):
        with np.load(Path(folder, unit["file"])) as arrays:
            assert arrays["boxes"][unit["row"]].tolist() == unit["box"]
            yield unit, torch.from_numpy(arrays["reconstructions"][unit["row"]])


def images(source: str) -> Tensor:
    if source == "files":
        paths = sorted(Path("pictures").glob("*"))
        return torch.stack([VIEW.tensor(Image.open(p)) for p in paths])
    found: Tensor = imported("my_nets.Numbers", ".", "")(23).images
    return found


def number(unit: dict[str, Any]) -> int:
    return int(Path(unit["picture"]).stem.removeprefix("image "))


def check(source: str, folder: str = "top", k: int = 3) -> None:
    """Against a search through all activations, and `Deconvnet`."""
    batch = images(source)
    model = imported("my_nets:build", ":", "")().eval()
    for layer in ("1", "5"):
        net = Deconvnet(model, layer)
        activations = net.activations(batch)
        largest = activations.flatten(2).amax(2)  # [N, C]
        found = list(reconstructions(layer, folder))
        assert len(found) == k * activations.shape[1] == index(folder)["layers"][layer]["units"]
        for channel in range(activations.shape[1]):
            mine = [unit for unit, _ in found if unit["channel"] == channel]
            given = torch.tensor([unit["activation"] for unit in mine])
            expected = largest[:, channel].topk(k).values
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
            assert len({unit["picture"] for unit in mine}) == k
            share = float((largest[:, channel] > 0).float().mean())
            assert mine[0]["fires"] == pytest.approx(share)
        for unit, reconstruction in found:
            place = (number(unit), unit["channel"], *unit["position"])
            assert float(activations[place]) == pytest.approx(unit["activation"], rel=1e-5)
            patch, box = net.reconstruct(batch, torch.tensor([place]), crop=True)
            assert box[0].tolist() == unit["box"]
            assert unit["verified"]
            torch.testing.assert_close(reconstruction, patch[0], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("folder")
def test_over_files() -> None:
    top(*FILES, *WANTED)
    check("files")


@pytest.mark.usefixtures("folder")
def test_over_a_data_module_each_image_is_read_once_and_each_winner_once_more() -> None:
    found = top(*DATA, *WANTED)
    check("data")
    assert (found["input"]["mean"], found["input"]["std"]) == ([0.5, 0.4, 0.3], [0.25, 0.2, 0.3])
    winners = {number(unit) for layer in ("1", "5") for unit in units(layer)}
    read = Counter(map(int, Path("read").read_text().split()))
    read[0] -= 1  # to know the size
    assert read == {n: 2 if n in winners else 1 for n in range(23)}


@pytest.mark.usefixtures("folder")
def test_units_are_those_of_attribute() -> None:
    words = [*FILES, "--layers", "5", "--channels", "2"]
    top(*words, "--raw", "none")
    assert main(["attribute", *words]) == 0
    other = json.loads(Path("attributions/index.json").read_text())["units"]
    same = ("channel", "position", "box", "picture", "fires", "verified")
    given = [[unit[key] for key in same] for unit in units("5")]
    assert given == [[unit[key] for key in same] for unit in other]
    activations = [unit["activation"] for unit in other]
    assert [unit["activation"] for unit in units("5")] == pytest.approx(activations, rel=1e-6)
    assert all("file" not in unit for unit in units("5"))
    assert not list(Path("top").rglob("*.npz"))


@pytest.mark.usefixtures("folder")
def test_the_pass_sees_each_image_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    look = looking.look

    def counting(net: Any, collector: Any, numbers: list[int], batch: Tensor) -> None:
        seen.extend(numbers)
        look(net, collector, numbers, batch)

    monkeypatch.setattr(looking, "look", counting)
    top(*DATA, "--layers", "*", "--channels", "all", "--raw", "none")
    assert sorted(seen) == list(range(23))


class Stopped(Exception):
    """Stands for a process that is killed: nothing is written after it."""


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("how", [KeyboardInterrupt, Stopped])
def test_a_run_that_is_stopped_goes_on(
    how: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    look, seen, calls = looking.look, list[int](), list[int]()

    def stopping(net: Any, collector: Any, numbers: list[int], batch: Tensor) -> None:
        look(net, collector, numbers, batch)
        calls.append(len(numbers))
        if len(calls) in (3, 6):  # after the batch was ranked, before that is noted
            raise how
        seen.extend(numbers)

    monkeypatch.setattr(looking, "look", stopping)
    words = ["top", *DATA, *WANTED]
    code = 1 if how is KeyboardInterrupt else 2
    assert main(words) == code
    if how is KeyboardInterrupt:
        assert "stopped after 4 of 23 images; the same command goes on" in capsys.readouterr().err
    assert not Path("top/index.json").exists()
    assert main(words) == code
    assert "going on: 4 of 23" in capsys.readouterr().err
    assert main(words) == 0
    assert "going on: 8 of 23" in capsys.readouterr().err
    check("data")
    assert seen == list(range(23))
    assert not Path("top/.unfinished").exists()


@pytest.mark.usefixtures("folder")
def test_what_was_kept_before_a_kill_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(looking, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(looking.KeepWhenStopped, "on_exception", lambda *_: None)
    look, seen = looking.look, list[int]()

    def dying(net: Any, collector: Any, numbers: list[int], batch: Tensor) -> None:
        if len(seen) == 8:
            raise Stopped
        look(net, collector, numbers, batch)
        seen.extend(numbers)

    monkeypatch.setattr(looking, "look", dying)
    assert main(["top", *DATA, *WANTED]) == 2
    monkeypatch.setattr(looking, "look", look)
    assert main(["top", *DATA, *WANTED]) == 0
    assert "going on: 8 of 23" in capsys.readouterr().err
    check("data")


@pytest.mark.usefixtures("folder")
def test_drawing_goes_on_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(strongest, "CHANNELS_A_PAGE", 3)
    page, drawn = top_pages.page, list[tuple[str, int]]()

    def stopping(net: Any, name: str, found: Any, at: int, *rest: Any) -> Any:
        if len(drawn) == 3:
            drawn.clear()
            raise KeyboardInterrupt
        drawn.append((name, at))
        return page(net, name, found, at, *rest)

    monkeypatch.setattr(top_pages, "page", stopping)
    words = ["top", *DATA, *WANTED, "--report"]
    assert main(words) == 1
    assert "3 of 5 figures are drawn; the same command goes on" in capsys.readouterr().err
    read = Path("read").read_text()
    assert main(words) == 0
    assert drawn == [("5", 1), ("5", 2)]
    # the winners are not read again; one image is, to know the size, and one to begin with
    assert Path("read").read_text() == read + "0\n0\n"
    check("data")
    assert Path("top/report.html").read_text().count("<article") == 6 + 8


@pytest.mark.usefixtures("folder")
def test_another_run_in_the_folder_of_a_stopped_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(looking, "look", stop)
        assert main(["top", *DATA, *WANTED]) == 1
    assert main(["top", *DATA, "--layers", "1"]) == 2
    said = capsys.readouterr().err
    assert "with other layers and channels, top-k; " in said
    assert "--force" in said
    top(*DATA, *WANTED, "--force")
    check("data")
    assert main(["top", *DATA, *WANTED]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_two_processes_find_what_one_does() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, "-m", "lit_deconv.cli", "top", *DATA, *WANTED]
    words += ["--devices", "2", "--report", "--json"]
    done = subprocess.run(
        words, check=False, capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == index()
    check("data")
    read = Counter(map(int, Path("read").read_text().split()))
    winners = {number(unit) for layer in ("1", "5") for unit in units(layer)}
    read[0] -= 2  # each process wants to know the size
    assert read == {n: 2 if n in winners else 1 for n in range(23)}


@pytest.mark.usefixtures("folder")
def test_processes_that_read_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    top(*FILES, *WANTED, "--workers", "1")
    check("files")
    size, cost = capsys.readouterr().err.splitlines()  # and nothing of Lightning's
    assert size.startswith("size: 40 x 40")
    assert cost.startswith("14 channels")


@pytest.mark.usefixtures("folder")
def test_unreadable_pictures_are_named_skipped_and_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = Path("pictures/1.png").read_bytes()
    Path("pictures/half.png").write_bytes(whole[: len(whole) // 2])
    Path("pictures/00.jpg").touch()
    shutil.copytree("pictures", "all")
    found = top("all", *FILES[1:], *WANTED)
    printed = capsys.readouterr()
    assert printed.err.count("skipped all/half.png") == 1
    assert "skipped: 2 of 7 images, unreadable" in printed.out
    assert sorted(found["skipped"]) == ["all/00.jpg", "all/half.png"]
    for path in ("pictures/half.png", "pictures/00.jpg"):
        Path(path).unlink()
    check("files")


@pytest.mark.usefixtures("folder")
def test_a_data_module_of_image_folder_names_its_files() -> None:
    for name in ("cat", "dog"):
        Path("classes", name).mkdir(parents=True)
        for at in range(2):
            shutil.copy(f"pictures/{at}.png", f"classes/{name}/{at}.png")
    top("--datamodule", "my_nets.Folder", "--model", "my_nets:build", "--layers", "1")
    assert {u["picture"] for u in units("1")} == {
        f"classes/{name}/{at}.png" for name in ("cat", "dog") for at in range(2)
    }
    assert "Normalisation unknown" in index()["note"]


@pytest.mark.usefixtures("folder")
def test_figures_log_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = top(*FILES, *WANTED, "--json", "--raw", "float16")
    assert json.loads(capsys.readouterr().out) == found
    log = EventAccumulator("top/tensorboard", size_guidance={"images": 0})
    log.Reload()
    tags = log.Tags()["images"]
    assert sorted(f"{tag}.png" for tag in tags) == sorted(f["file"] for f in found["figures"])
    for tag in tags:
        (event,) = log.Images(tag)
        assert event.encoded_image_string == Path("top", f"{tag}.png").read_bytes()
    assert next(reconstructions("1"))[1].dtype == torch.float16


@pytest.mark.usefixtures("folder")
def test_what_it_takes_is_said_before_and_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *DATA, *WANTED, "--estimate", "--json"]) == 0
    printed = capsys.readouterr()
    assert "14 channels, 42 units. Memory beside the model" in printed.err
    cost = json.loads(printed.out)["cost"]
    assert not Path("top").exists()
    top(*DATA, *WANTED)
    size = {
        kind: sum(p.stat().st_size for p in Path("top").rglob(f"*.{kind}")) for kind in ("png",)
    }
    log = sum(p.stat().st_size for p in Path("top/tensorboard").iterdir())
    assert 0 < size["png"] + log <= cost["figures"] * 1.05
    values = sum(tensor.nbytes for layer in ("1", "5") for _, tensor in reconstructions(layer))
    assert values == cost["raw"]
    assert cost["winners"] == 23 * 3 * 20 * 16 * 4


@pytest.mark.usefixtures("folder")
def test_no_room_on_the_disk_is_told_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 1000))
    assert main(["top", *DATA, *WANTED]) == 2
    assert "has 1e+03 B left; name fewer --channels" in capsys.readouterr().err
    assert not list(Path("top").iterdir())


BAD = [
    (["--model", "my_nets:build"], "no images: name files or folders, or a --datamodule"),
    ([*DATA, "--raw", "int8"], "--raw 'int8': expected float32, float16, none"),
    ([*DATA, "--split", "valid"], "--split 'valid': expected val, train, test, predict"),
    ([*DATA, "--datamodule-args", '{"size": 3}'], "its arguments go into --datamodule-args"),
    ([*DATA, "--datamodule-args", '{"count": 0}'], "my_nets.Data (val) has no image"),
    ([*DATA, "--devices", "0"], "devices"),
    ([*DATA, "--layers", "8"], "feature maps"),
    (["--datamodule", "my_nets.Pictures", *DATA[2:]], "is no LightningDataModule"),
    (["--datamodule", "my_nets.Streamed", *DATA[2:]], "Stream, whose images cannot be read by"),
    (["--datamodule", "my_nets.Dato", *DATA[2:]], "nearest: Data"),
    (["text.png", *FILES[1:]], "none of the images could be read"),
    ([*DATA, "--device", "cuda"], "torch finds 0 GPUs here"),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_one_line_and_exit_code_2(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("text.png").write_text("no picture")
    assert main(["top", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    *_, last = printed.err.strip().splitlines()
    assert last.startswith("lit-deconv: ")
    assert said in last
    assert not Path("top").exists()


@pytest.mark.usefixtures("folder")
def test_a_report_too_large_for_a_browser_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(top_plan, "REPORT_CHANNELS", 13)
    assert main(["top", *DATA, *WANTED, "--report"]) == 2
    assert "14 channels is too large for a browser" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_options_come_from_yaml_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(
        "model: my_nets:build\nlayers: '5'\nimages: [pictures]\nraw: none\n"
    )
    with pytest.raises(SystemExit, match="0"):
        main(["top", "--config", "run.yaml", "--print_config"])
    assert "images:\n- pictures\n" in capsys.readouterr().out
    assert list(top("--config", "run.yaml")["layers"]) == ["5"]
    assert main(["top", "--config", "run.yaml", "nowhere.png"]) == 2
    assert "no file or folder nowhere.png" in capsys.readouterr().err

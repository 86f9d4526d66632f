"""Two processes draw what one would, and neither waits for the other where that one failed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_models import equal, expected_tags, pictures
from PIL import ImageChops
from two_processes import FAULTS, IMAGES

DRAWN = {tag for tag in expected_tags("net.1") if "captum" not in tag}
SCRIPT = Path(__file__).with_name("two_processes.py")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two processes wrote."""
    where = tmp_path_factory.mktemp("processes")
    alone = {key: value for key, value in os.environ.items() if key != "LOCAL_RANK"}
    both = alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environments = [alone, *(both | {"LOCAL_RANK": str(rank)} for rank in range(2))]
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(where / str(devices)), str(devices)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment, devices in zip(environments, (1, 2, 2), strict=True)
    ]
    try:
        outputs = [each.communicate(timeout=600)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    assert not any(each.returncode for each in started), "\n".join(outputs)
    return where


def test_the_same_winners_as_one_process(folder: Path) -> None:
    one: Any = torch.load(folder / "1/1.pt", weights_only=False)
    two: Any = torch.load(folder / "2/2.pt", weights_only=False)
    assert one.keys() == two.keys() == {"net.1", "net.3"}
    for layer, alone in one.items():
        both = two[layer]
        # the sampler gives one image to both, so that each has as many
        assert alone.ranked == both.ranked == IMAGES
        assert torch.equal(alone.health.dead, both.health.dead)
        for ours, theirs in zip(alone.strongest_rows, both.strongest_rows, strict=True):
            assert ours.label == theirs.label
            for mine, other in zip(ours.panels, theirs.panels, strict=True):
                assert torch.allclose(mine.image, other.image, atol=1e-5)
        assert len(alone.strongest_rows) == 1
        assert len(alone.channels) == len(both.channels)
        for ours, theirs in zip(alone.channels, both.channels, strict=True):
            assert len(ours.activations) == IMAGES
            assert theirs.activations == pytest.approx(ours.activations, rel=1e-5, abs=1e-6)
            assert theirs.fires == ours.fires
            assert torch.equal(theirs.patches, ours.patches)
            assert torch.allclose(theirs.reconstructions, ours.reconstructions, atol=1e-5)


def test_all_pictures_are_there_once(folder: Path) -> None:
    found = pictures(folder / "2/none")
    assert found.keys() == expected_tags("net.1", "net.3")
    assert all(len(each) == 1 for each in found.values())


def test_drawn_they_are_the_same_pictures(folder: Path) -> None:
    one, two = pictures(folder / "1/none"), pictures(folder / "2/none")
    for layer in ("net.1", "net.3"):
        for figure in ("grid", "evolution", "strongest_beside_captum"):
            (ours,) = one[f"deconv/{layer}/{figure}"].values()
            (theirs,) = two[f"deconv/{layer}/{figure}"].values()
            extrema: Any = ImageChops.difference(
                ours.convert("RGB"), theirs.convert("RGB")
            ).getextrema()
            assert all(high <= 1 for _, high in extrema), (layer, figure)


def test_training_is_equal_to_the_bit(folder: Path) -> None:
    found: Any = torch.load(folder / "2/unnoticed.pt", weights_only=False)
    for what, value in found[False].items():
        assert equal(value, found[True][what]), what
    assert pictures(folder / "2/callback True").keys() == expected_tags("net.2", "net.5")


@pytest.fixture(scope="module")
def faults(folder: Path) -> Any:
    return torch.load(folder / "2/faults.pt", weights_only=False)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_in_one_process_or_both(fault: str, faults: Any, folder: Path) -> None:
    without, nothing = faults[""]
    weights, warned = faults[fault]
    assert nothing == set()
    assert equal(dict(weights), dict(without))
    (text,) = warned
    assert "on purpose" in text
    # what was drawn before is there to be read
    found = pictures(folder / "2" / fault)
    assert found.keys() == DRAWN
    assert all(min(each) == 1 for each in found.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_without_a_batch(rank: int, faults: Any, folder: Path) -> None:
    (weights, _), (without, warned, seen) = faults["images in 0"][:2], faults[f"images in {rank}"]
    assert equal(dict(weights), dict(without))
    if rank == 0:
        assert not warned
        assert {each.ranked for each in seen.values()} == {4}
        assert pictures(folder / "2/images in 0").keys() == DRAWN
    else:
        # it is the first process that draws
        (text,) = warned
        assert "the first process saw no batch" in text

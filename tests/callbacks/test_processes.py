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
from two_processes import FAULTS, IMAGES

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
    for layer, (channels, health, ranked) in one.items():
        others, other_health, other_ranked = two[layer]
        # the sampler gives one image to both, so that each has as many
        assert ranked == other_ranked == IMAGES
        assert torch.equal(health.dead, other_health.dead)
        assert len(channels) == len(others)
        for ours, theirs in zip(channels, others, strict=True):
            assert len(ours.activations) == IMAGES
            assert theirs.activations == pytest.approx(ours.activations, rel=1e-5, abs=1e-6)
            assert theirs.fires == ours.fires
            assert torch.equal(theirs.patches, ours.patches)
            assert torch.allclose(theirs.reconstructions, ours.reconstructions, atol=1e-5)


def test_all_pictures_are_there_once(folder: Path) -> None:
    found = pictures(folder / "2/none")
    assert found.keys() == expected_tags("net.1", "net.3")
    assert all(len(each) == 1 for each in found.values())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_in_one_process_alone(fault: str, folder: Path) -> None:
    faults: Any = torch.load(folder / "2/faults.pt", weights_only=False)
    without, nothing = faults[""]
    weights, warned = faults[fault]
    assert nothing == set()
    assert equal(dict(weights), dict(without))
    (text,) = warned
    assert "in the second process" in text

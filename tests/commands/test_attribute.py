"""`lit-deconv attribute`: what it writes is what `Deconvnet` gives, and what Captum gives beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
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
from lit_deconv.commands import beside, job, strongest
from lit_deconv.commands.models import imported
from lit_deconv.commands.pictures import View
from lit_deconv.render import Row

VIEW = View((40, 40), None, (0.5,), (0.25,))
GIVEN = ["--model", "my_nets:build", "--mean", "0.5", "--std", "0.25"]


def attribute(*words: str) -> dict[str, Any]:
    assert main(["attribute", "pictures", *GIVEN, *words]) == 0
    return index("attributions")


def index(folder: str) -> dict[str, Any]:
    found = json.loads(Path(folder, "index.json").read_text())
    assert found["complete"]
    return found


def model() -> torch.nn.Module:
    return imported("my_nets:build", ":", "--model")().eval()


def images() -> Tensor:
    return torch.stack([VIEW.tensor(Image.open(p)) for p in sorted(Path("pictures").glob("*"))])


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows of all comparisons that are drawn from now on."""
    drawn: list[Row] = []
    side_by_side = job.side_by_side

    def draw(rows: Sequence[Row], *rest: Any) -> Tensor:
        drawn.extend(rows)
        return side_by_side(rows, *rest)

    monkeypatch.setattr(job, "side_by_side", draw)
    return drawn


def same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max())


def rows(found: dict[str, Any], layer: str) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Each unit of a layer with its raw reconstruction, as the files have it."""
    for unit in found["units"]:
        if unit["layer"] == layer:
            with np.load(Path("attributions", unit["file"])) as arrays:
                assert arrays["boxes"][unit["row"]].tolist() == unit["box"]
                yield unit, torch.from_numpy(arrays["reconstructions"][unit["row"]])


@pytest.mark.usefixtures("folder")
def test_strongest_units_are_those_of_the_layer_and_reconstruct_as_deconvnet_does() -> None:
    found = attribute("--layers", "1,5", "--channels", "all", "--top-k", "3", "--batch-size", "2")
    assert list(found["layers"]) == ["1", "5"]
    for layer in ("1", "5"):
        net, batch = Deconvnet(model(), layer), images()
        activations = net.activations(batch)
        largest = activations.flatten(2).amax(2)  # [N, C]
        units = list(rows(found, layer))
        assert len(units) == 3 * activations.shape[1]
        for channel in range(activations.shape[1]):
            mine = [unit for unit, _ in units if unit["channel"] == channel]
            expected = largest[:, channel].topk(3).values
            given = torch.tensor([unit["activation"] for unit in mine])
            torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)
            assert len({unit["picture"] for unit in mine}) == 3
            assert mine[0]["fires"] == pytest.approx(
                float((largest[:, channel] > 0).float().mean())
            )
        for unit, reconstruction in units:
            sample = int(Path(unit["picture"]).stem)
            place = (sample, unit["channel"], *unit["position"])
            assert float(activations[place]) == pytest.approx(unit["activation"], rel=1e-5)
            patch, box = net.reconstruct(batch, torch.tensor([place]), crop=True)
            assert box[0].tolist() == unit["box"]
            assert unit["verified"]
            torch.testing.assert_close(reconstruction, patch[0], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("seed", ["layer", "2", "2,1,3"])
def test_other_seeds_give_one_reconstruction_a_picture(seed: str) -> None:
    found = attribute("--layers", "1,5", "--seed", seed, "--batch-size", "2")
    selector = {"layer": None, "2": 2, "2,1,3": (2, 1, 3)}[seed]
    for layer in ("1", "5"):
        net, batch = Deconvnet(model(), layer), images()
        expected, activations = net.attribute(batch, selector), net.activations(batch)
        units = list(rows(found, layer))
        assert [Path(unit["picture"]).stem for unit, _ in units] == list("01234")
        for sample, (unit, reconstruction) in enumerate(units):
            top, left, bottom, right = unit["box"]
            whole = torch.zeros_like(batch[0])
            t, le, b, r = max(top, 0), max(left, 0), min(bottom, 40), min(right, 40)
            whole[:, t:b, le:r] = reconstruction[:, t - top : b - top, le - left : r - left]
            torch.testing.assert_close(whole, expected[sample], rtol=1e-4, atol=1e-6)
            kept = activations[sample] if selector is None else activations[sample][selector]
            assert unit["activation"] == pytest.approx(float(kept.max()), rel=1e-5)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("seed", ["strongest", "layer", "2", "2,1,3"])
def test_captum_beside_agrees_where_it_is_the_deconvnet(
    seed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = watched(monkeypatch)
    found = attribute("--layers", "5", "--seed", seed, "--compare", "NeuronDeconvolution,Saliency")
    assert found["compare"] == ["NeuronDeconvolution", "Saliency"]
    assert len(drawn) == (8 if seed == "strongest" else 5)
    for row in drawn:
        by_name = {panel.name: panel for panel in row.panels}
        ours = row.panels[1].image
        assert ours is not None
        (captum,) = [p for name, p in by_name.items() if name.startswith("Captum Neuron")]
        torch.testing.assert_close(captum.image, ours, rtol=1e-3, atol=1e-5)
        assert "cosine 1.00" in captum.note or not ours.any()
        assert "class " in by_name["Captum Saliency"].note
    figures = [f["file"] for f in found["figures"] if "captum" in f["file"]]
    assert figures
    assert all(Path("attributions", file).is_file() for file in figures)


@pytest.mark.usefixtures("folder")
def test_where_captum_is_wrong_the_figure_says_so_and_gives_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = watched(monkeypatch)
    words = ["--model", "my_nets:functional", "--layers", "second"]
    methods = "NeuronDeconvolution,Deconvolution,NeuronGradient"
    code = main(["attribute", "pictures", *words, "--seed", "1", "--compare", methods])
    assert code == 0
    assert index("attributions")["layers"]["second"]["captum_faults"]
    for row in drawn:
        notes = {panel.name: panel.note for panel in row.panels}
        assert "no agreement" in notes["Captum NeuronDeconvolution"]
        assert "cosine" not in notes["Captum NeuronDeconvolution"]
        assert "no class" in notes["Captum Deconvolution"]  # its output is no logits
        assert "cosine" in notes["Captum NeuronGradient"]


@pytest.mark.usefixtures("folder")
def test_a_method_that_fails_does_not_keep_the_others_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    attribute("--layers", "5", "--compare", "Occlusion,Saliency", "--channels", "2")
    assert "Occlusion failed" in capsys.readouterr().err


@pytest.mark.usefixtures("folder")
def test_arguments_reach_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    attributed = beside.captum_attribution

    def attribution_of(name: str, *rest: Any, **options: Any) -> Tensor:
        asked.append(options)
        return attributed(name, *rest, **options)

    monkeypatch.setattr(beside, "captum_attribution", attribution_of)
    options = '{"IntegratedGradients": {"n_steps": 3}}'
    words = ["--compare", "IntegratedGradients", "--compare-args", options, "--seed", "layer"]
    attribute("--layers", "5", *words)
    assert {options["n_steps"] for options in asked} == {3}


@pytest.mark.usefixtures("folder")
def test_a_glob_takes_the_layers_that_have_feature_maps() -> None:
    assert list(attribute("--layers", "*")["layers"]) == ["0", "1", "2", "3", "4", "5", "6"]


@pytest.mark.usefixtures("folder")
def test_log_reads_back() -> None:
    found = attribute("--layers", "1,5", "--top-k", "1")
    log = EventAccumulator("attributions/tensorboard", size_guidance={"images": 0})
    log.Reload()
    tags = log.Tags()["images"]
    assert sorted(f"{tag}.png" for tag in tags) == sorted(f["file"] for f in found["figures"])
    for tag in tags:
        (event,) = log.Images(tag)
        assert event.encoded_image_string == Path("attributions", f"{tag}.png").read_bytes()


@pytest.mark.usefixtures("folder")
def test_json_goes_to_stdout_and_nothing_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--layers", "5", "--json", "--output", "here"]
    assert main(["attribute", "pictures/0.png", *GIVEN, *words]) == 0
    assert json.loads(capsys.readouterr().out) == index("here")


@pytest.mark.usefixtures("folder")
def test_layers_are_chosen_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(attribute()["layers"]) == ["1", "5"]
    said = capsys.readouterr().out
    assert "--logdir attributions/tensorboard" in said


@pytest.mark.usefixtures("folder")
def test_channels(capsys: pytest.CaptureFixture[str]) -> None:
    def channels(*words: str) -> list[int]:
        found = attribute("--layers", "5", "--force", *words)
        return list(dict.fromkeys(unit["channel"] for unit in found["units"]))

    assert channels("--channels", "3") == [0, 2, 5]
    assert channels("--channels", "3,1") == [3, 1]
    assert channels("--channels", "6,") == [6]
    assert channels("--channels", "all") == channels("--channels", "100") == list(range(8))


@pytest.mark.usefixtures("folder")
def test_channels_go_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    together = attribute("--layers", "5", "--channels", "all")
    monkeypatch.setattr(strongest, "CHANNELS_A_PAGE", 3)
    paged = attribute("--layers", "5", "--channels", "all", "--force")
    assert len(paged["figures"]) == 3
    same = ("channel", "position", "activation", "box", "picture")
    for one, other in zip(together["units"], paged["units"], strict=True):
        assert [one[key] for key in same] == [other[key] for key in same]


@pytest.mark.usefixtures("folder")
def test_a_grey_model_is_given_grey_pictures() -> None:
    words = ["--model", "my_nets:build", "--model-args", '{"channels": 1}', "--layers", "1"]
    assert main(["attribute", "pictures", *words]) == 0
    found = index("attributions")
    assert found["input"]["channels"] == 1
    assert next(rows(found, "1"))[1].shape == (1, 5, 5)


@pytest.mark.usefixtures("folder")
def test_what_was_not_normalised_is_said() -> None:
    assert main(["attribute", "pictures", "--model", "my_nets:build"]) == 0
    assert "Normalisation unknown" in index("attributions")["note"]
    assert "unknown" not in attribute("--force")["note"]


@pytest.mark.usefixtures("folder")
def test_a_data_module_says_how_pictures_are_normalised() -> None:
    words = ["--model", "my_nets:build", "--datamodule", "my_nets.Pictures"]
    assert main(["attribute", "pictures", *words]) == 0
    found = index("attributions")
    assert (found["input"]["mean"], found["input"]["std"]) == ([0.5, 0.4, 0.3], [0.25, 0.2, 0.3])


@pytest.mark.usefixtures("folder")
def test_torchvision_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "resnet18", "--size", "64", "--layers", "layer1,layer4", "--channels", "2"]
    assert main(["attribute", "pictures", *words, "--top-k", "2"]) == 0
    found = index("attributions")
    assert "Random weights." in found["note"]
    assert found["input"]["size"] == [64, 64]
    assert found["input"]["mean"] == [0.485, 0.456, 0.406]
    assert len(found["units"]) == 8
    assert all(unit["verified"] for unit in found["units"])


@pytest.mark.usefixtures("folder")
def test_a_checkpoint_of_lightning() -> None:
    from lightning.pytorch import Trainer

    torch.manual_seed(1)
    module = imported("my_nets.Net", ".", "--class")(width=5)
    torch.nn.init.normal_(module.net[0].weight)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint("net.ckpt")
    words = ["--checkpoint", "net.ckpt", "--class", "my_nets.Net", "--layers", "net.1"]
    assert main(["attribute", "pictures/0.png", *words, "--seed", "layer", *GIVEN[2:]]) == 0
    ((_, reconstruction),) = rows(index("attributions"), "net.1")
    expected = Deconvnet(module, "net.1").attribute(images()[:1])
    assert same(reconstruction, expected[0])


@pytest.mark.usefixtures("folder")
def test_a_state_dict() -> None:
    given = model()
    torch.nn.init.normal_(given[0].weight)  # type: ignore[index]
    state = {f"module.{key}": value for key, value in given.state_dict().items()}
    torch.save({"state_dict": state}, "weights.pt")
    attribute("--state-dict", "weights.pt", "--layers", "1", "--seed", "layer")
    _, reconstruction = next(rows(index("attributions"), "1"))
    expected = Deconvnet(given, "1").attribute(images()[:1])
    assert same(reconstruction, expected[0])


@pytest.mark.usefixtures("folder")
def test_an_interrupted_run_keeps_what_is_finished(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reconstruct = strongest.reconstruct_top

    def stopped(net: Deconvnet, top: Any) -> Any:
        if "5" in top:
            raise KeyboardInterrupt
        return reconstruct(net, top)

    monkeypatch.setattr(strongest, "reconstruct_top", stopped)
    assert main(["attribute", "pictures", *GIVEN, "--layers", "1,5"]) == 1
    error = capsys.readouterr().err
    assert "layers finished: 1;" in error
    found = json.loads(Path("attributions/index.json").read_text())
    assert not found["complete"]
    assert list(found["layers"]) == ["1"]
    for figure in found["figures"]:
        Image.open(Path("attributions", figure["file"])).load()
    assert len(list(rows(found, "1"))) == 30  # 6 channels, 5 pictures each


@pytest.mark.usefixtures("folder")
def test_options_come_from_yaml_too(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("model: my_nets:build\nlayers: '5'\nimages: [pictures]\n")
    assert main(["attribute", "pictures", "--config", "run.yaml"]) == 0
    assert list(index("attributions")["layers"]) == ["5"]
    with pytest.raises(SystemExit, match="0"):
        main(["attribute", "pictures", "--config", "run.yaml", "--print_config"])
    assert re.search("layers: '?5'?", capsys.readouterr().out)

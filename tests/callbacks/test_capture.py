"""What the hooks find out: who runs on images, on which images, which layers."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from callback_models import compiled, hooks_on, tiny_net
from lit_deconv.callbacks.capture import Capture, NoImageError
from lit_deconv.callbacks.probe import Probe, find_images, joined
from lit_deconv.callbacks.strongest import NOTHING
from lit_deconv.callbacks.watch import Watch, is_compiled, probe_plan, spread
from torch import Tensor, nn

from lit_deconv.layers import named_layers
from lit_deconv.top import hashed


def model_of(**parts: nn.Module) -> Any:
    """A model whose parts are called as its steps please."""
    return Model(**parts)


class Model(nn.Module):
    """Stands for a LightningModule: steps call parts of it as they please."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def watched(model: nn.Module, step: Any, size: int = 4, **options: Any) -> Any:
    """A watch that has seen one step."""
    given: dict[str, Any] = {"layers": {}, "entry": None, "input_key": None} | options
    watch: Any = Watch(model, given["layers"], given["entry"], given["input_key"], size)
    watch.begin(1)
    watch.before(0)
    step()
    watch.after(step, None, 0)
    assert hooks_on(model) == 0
    assert watch.probe is not None
    return watch


def test_the_outermost_module_that_runs_on_images_and_its_input() -> None:
    model = model_of(encoder=tiny_net(), head=nn.Linear(3, 2))
    images = torch.randn(4, 3, 8, 8)
    watch = watched(model, lambda: model.head(model.encoder(images * 2)))
    assert watch.entry == "encoder"
    assert list(watch.layers) == ["encoder.1", "encoder.4"]
    assert torch.equal(watch.probe.images, images * 2)
    assert watch.reads_on == "head"


def test_augmentation_before_the_encoder_is_not_the_one_that_runs() -> None:
    blur = nn.AvgPool2d(3, 1, 1)
    model = model_of(augment=blur, encoder=tiny_net())
    images = torch.randn(4, 3, 8, 8)
    watch = watched(model, lambda: model.encoder(model.augment(images)))
    assert watch.entry == "encoder"
    assert torch.equal(watch.probe.images, blur(images))
    assert watch.reads_on == ""


def test_two_views_in_a_step_are_separate_images() -> None:
    model = model_of(encoder=tiny_net())
    views = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    watch = watched(model, lambda: [model.encoder(view) for view in views], size=4)
    assert torch.equal(watch.probe.images, torch.cat(views))
    assert list(watch.layers) == ["encoder.1", "encoder.4"]


def test_the_caught_images_are_copies() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(3, 2, 3), nn.ReLU()

        def forward(self, images: Tensor) -> Tensor:
            return self.relu(self.conv(images.mul_(0)))

    model = model_of(net=InPlace())
    images = torch.randn(4, 3, 8, 8)
    kept = images.clone()
    with torch.inference_mode():
        watch = watched(model, lambda: model.net(images))
    assert torch.equal(watch.probe.images, kept)
    assert not watch.probe.images.is_inference()


def test_a_chosen_layer_decides_who_runs() -> None:
    model = model_of(first=tiny_net(), second=tiny_net())
    images = torch.randn(4, 3, 8, 8)
    layers = {"second.3": named_layers(model)["second.3"]}
    watch = watched(model, lambda: (model.first(images), model.second(images + 1)), layers=layers)
    assert watch.entry == "second"
    assert torch.equal(watch.probe.images, images + 1)


def test_a_named_module_inside_the_one_that_runs() -> None:
    model = model_of(net=nn.Sequential(nn.Conv2d(3, 3, 1), tiny_net()))
    images = torch.randn(2, 3, 8, 8)
    watch = watched(model, lambda: model.net(images), entry="net.1")
    assert torch.equal(watch.probe.images, model.net[0](images))


def test_a_dict_a_keyword_and_a_position() -> None:
    left, right = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    batch = {"left": left, "right": right, "label": torch.arange(4)}
    for key, wanted in ((None, left), ("right", right)):
        found = find_images((batch,), {}, key)
        assert found is not None
        assert torch.equal(found.images, wanted)
        assert not found.is_plain
    for position, wanted in ((0, left), (1, right)):
        found = find_images((left, right), {}, position)
        assert found is not None
        assert torch.equal(found.images, wanted)
    keyword = find_images((left,), {"other": right}, "other")
    assert keyword is not None
    assert torch.equal(keyword.images, right)
    assert find_images((torch.arange(4), left[0]), {}, None) is None


def test_other_arguments_follow_their_images() -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    found = find_images(({"x": images, "y": labels, "t": torch.ones(1)},), {"flag": True}, None)
    assert found is not None
    both = joined([found.take([1]), found.take([3, 0])])
    (arguments,), keywords = both.arguments()
    assert torch.equal(arguments["x"], images[[1, 3, 0]])
    assert arguments["y"].tolist() == [1, 3, 0]
    assert arguments["t"].tolist() == [1.0]
    assert keywords == {"flag": True}
    own = both.with_images(torch.zeros(2, 3, 5, 5))
    assert own.arguments()[0][0]["y"].tolist() == [1, 1]


def test_the_strongest_units_over_all_batches() -> None:
    model = model_of(net=tiny_net())
    batches = [torch.randn(3, 3, 8, 8) for _ in range(3)]
    watch: Any = Watch(model, {}, None, None, 2)
    watch.begin(3)
    for index, batch in enumerate(batches):
        watch.before(index)
        model.net(batch)
        watch.after(model.net, batch, index)
    assert len(watch.probe.images) == 2
    assert watch.rows == {0: [0], 1: [0]}
    top = watch.collection.compute()
    for name in ("net.1", "net.4"):
        maps = model.net[: int(name[-1]) + 1](torch.cat(batches)).amax((2, 3))
        values, order = maps.T.sort(descending=True)
        assert top[name].images == 9
        assert torch.allclose(top[name].values, values)
        who = hashed(torch.cat(batches))[order]
        # where a channel does not fire, images are tied
        assert torch.equal(top[name].identity[values > 0], who[values > 0])
        assert torch.equal(top[name].fires, (maps > 0).float().mean(0))


def test_a_continued_run_keeps_the_same_images() -> None:
    model = model_of(net=tiny_net())
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    watch: Any = Watch(model, {}, None, None, 9, rows={1: [3, 0]})
    watch.begin(2)
    for index, batch in enumerate(batches):
        watch.before(index)
        model.net(batch)
        watch.after(model.net, batch, index)
    assert torch.equal(watch.probe.images, batches[1][[3, 0]])


def test_a_process_without_images_changes_nothing() -> None:
    model = model_of(net=tiny_net())
    watch = watched(model, lambda: model.net(torch.randn(4, 3, 8, 8)))
    own = watch.collection.share()
    alone = watch.collection.compute()
    watch.collection.merge([own, NOTHING])
    together = watch.collection.compute()
    assert together.keys() == alone.keys() == {"net.1", "net.4"}
    for name, top in together.items():
        assert top.images == 4
        assert torch.equal(top.values, alone[name].values)
        assert torch.equal(top.fires, alone[name].fires)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.flat(torch.zeros(2, 5)), r"flat\(float32 \[2, 5\]\)"),
        (lambda model: None, "not called at all"),
        (
            lambda model: model.net(torch.zeros(2, 3, 8, 8, dtype=torch.int64).float()[0]),
            "no module was given a batch",
        ),
    ],
)
def test_a_model_that_takes_no_image(call: Any, words: str) -> None:
    model = model_of(net=tiny_net(), flat=nn.Linear(5, 5))

    def step() -> None:
        with contextlib.suppress(RuntimeError):
            call(model)

    with pytest.raises(NoImageError, match=words):
        watched(model, step)
    assert hooks_on(model) == 0


def test_a_forward_that_raises_leaves_no_open_call() -> None:
    model = model_of(net=tiny_net())
    capture = Capture({"": model, **named_layers(model)})
    capture.attach(lambda count: [0])
    with pytest.raises(RuntimeError):
        model.net(torch.zeros(1, 7, 8, 8))
    images = torch.ones(1, 3, 8, 8)
    model.net(images)
    capture.detach()
    assert capture.failure is None


def test_a_hook_that_fails_does_not_stop_the_forward() -> None:
    model = model_of(net=tiny_net())

    def broken(count: int) -> list[int]:
        raise MemoryError("no room")

    watch: Any = Watch(model, {}, None, None, 4)
    watch.begin(1)
    watch._choose = lambda batch_idx: broken
    watch.before(0)
    assert model.net(torch.zeros(1, 3, 8, 8)).shape == (1, 3)
    with pytest.raises(MemoryError, match="no room"):
        watch.after(model.net, None, 0)
    assert hooks_on(model) == 0


def test_the_probe_is_spread_over_the_batches() -> None:
    assert probe_plan(8, 100) == {i * 100 // 8: 1 for i in range(8)}
    assert probe_plan(8, 3) == {0: 3, 1: 3, 2: 2}
    assert probe_plan(8, float("inf")) == {0: 8}
    assert spread(10, 3) == [0, 3, 6]
    assert spread(2, 3) == [0, 1]


def test_compiled_parts_are_seen() -> None:
    assert not is_compiled(tiny_net())
    assert is_compiled(nn.Sequential(compiled(tiny_net())))
    inplace = tiny_net()
    inplace.compile(backend="eager")
    assert is_compiled(nn.Sequential(inplace))

    class Decorated(nn.Module):
        @torch.compile(backend="eager")
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert is_compiled(nn.Sequential(Decorated()))


def test_a_probe_of_images_alone_is_plain() -> None:
    found = find_images((torch.zeros(2, 1, 4, 4),), {}, None)
    assert isinstance(found, Probe)
    assert found.is_plain
    assert found.take([0]).is_plain

"""PNG encoding, sinks for each kind of logger, and the writer's thread."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)
from torch import Tensor

from lit_deconv import sinks
from lit_deconv.render import to_tensor
from lit_deconv.sinks import (
    FileSink,
    NullSink,
    Picture,
    TensorBoardSink,
    encode_png,
    sink,
    sink_for,
    sinks_for,
)
from lit_deconv.writer import Writer


def picture(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=generator)


def decode(png: bytes) -> Tensor:
    return to_tensor(Image.open(io.BytesIO(png)))


def events(folder: str | None) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


class Recorder(NullSink):
    """Keeps what it is given, and fails where it is told to."""

    def __init__(self, fail: tuple[int, ...] = ()) -> None:
        self.fail, self.steps, self.threads = fail, [], set()  # type: ignore[var-annotated]
        self.flushed = 0

    def image(self, picture: Picture) -> None:
        if picture.step in self.fail:
            raise OSError(f"disk full at {picture.step}")
        self.steps.append(picture.step)
        self.threads.add(threading.get_ident())

    def flush(self) -> None:
        self.flushed += 1


class TestPng:
    def test_is_lossless(self) -> None:
        assert torch.equal(decode(encode_png(picture())), picture())

    def test_refuses_floats(self) -> None:
        with pytest.raises(ValueError, match="uint8"):
            encode_png(torch.rand(3, 4, 4))


class TestTensorBoard:
    def test_reads_back_bytes_step_and_caption(self, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path)
        found = sink_for(logger)
        assert isinstance(found, TensorBoardSink)
        png = encode_png(picture())
        found.image(Picture("deconv/features.3/grid", png, 40, 60, 7, "averaged weights"))
        found.text("deconv/features.3/channels", "| a |\n|---|\n| 1 |", 7)
        found.flush()
        read = events(logger.log_dir)
        (event,) = read.Images("deconv/features.3/grid")
        assert event.step == 7
        assert (event.height, event.width) == (40, 60)
        assert event.encoded_image_string == png
        about = read.SummaryMetadata("deconv/features.3/channels/text_summary")
        assert about.plugin_data.plugin_name == "text"
        (text,) = read.Tensors("deconv/features.3/channels/text_summary")
        assert text.tensor_proto.string_val[0].decode() == "| a |\n|---|\n| 1 |"

    def test_readers_do_not_warn(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # tensorboard's logger does not propagate, where caplog listens
        monkeypatch.setattr(logging.getLogger("tensorboard"), "propagate", True)
        logger = TensorBoardLogger(tmp_path)
        found = sink_for(logger)
        assert found is not None
        found.image(Picture("grid", encode_png(picture()), 40, 60, 7, "averaged weights"))
        found.flush()
        with caplog.at_level(logging.DEBUG):
            read = events(logger.log_dir)
        assert [event.step for event in read.Images("grid")] == [7]
        assert read.PluginTagToContent("images").keys() == {"grid"}
        assert "oddly" not in caplog.text

    def test_caption_is_the_description_that_tensorboard_shows(self, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.plugin_event_multiplexer import (
            EventMultiplexer,
        )

        logger = TensorBoardLogger(tmp_path)
        found = sink_for(logger)
        assert found is not None
        found.image(Picture("grid", encode_png(picture()), 40, 60, 7, "averaged weights"))
        found.flush()
        read = EventMultiplexer().AddRun(logger.log_dir, "run").Reload()
        about = read.SummaryMetadata("run", "grid")
        assert about.summary_description == "averaged weights"
        assert about.plugin_data.plugin_name == "images"
        (event,) = read.Tensors("run", "grid")
        width, height, png = event.tensor_proto.string_val
        assert (int(width), int(height)) == (60, 40)
        assert torch.equal(decode(png), picture())


class TestRegistry:
    def test_both_package_names_and_subclasses(self, tmp_path: Path) -> None:
        pytorch_lightning = pytest.importorskip("pytorch_lightning")

        class Mine(TensorBoardLogger):
            pass

        for logger in (Mine(tmp_path), pytorch_lightning.loggers.TensorBoardLogger(tmp_path)):
            assert isinstance(sink_for(logger), TensorBoardSink)

    def test_users_can_extend_and_override(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sinks, "_REGISTRY", list(sinks._REGISTRY))

        class Logger:
            pass

        class Below(Logger):
            pass

        assert sink_for(Below()) is None
        name = f"{Logger.__module__}.{Logger.__qualname__}"
        sink(name)(lambda logger: NullSink())
        assert isinstance(sink_for(Below()), NullSink)
        sink(name)(lambda logger: Recorder())
        assert isinstance(sink_for(Below()), Recorder)

    def test_a_class_of_the_same_name_elsewhere_is_another(self) -> None:
        other = type("TensorBoardLogger", (), {"__module__": "mylab.loggers"})
        assert sink_for(other()) is None
        alike = type("TensorBoardLogger", (), {"__module__": "lightning.pytorch.loggersandmore"})
        assert sink_for(alike()) is None

    def test_files_where_no_logger_takes_images(self, tmp_path: Path) -> None:
        for loggers, said in (([], "no logger"), ([CSVLogger(tmp_path)], "CSVLogger")):
            (found,), note = sinks_for(loggers, tmp_path / "pictures")
            assert isinstance(found, FileSink)
            assert said in note
            assert str(tmp_path / "pictures") in note

    def test_several_loggers_at_once(self, tmp_path: Path) -> None:
        boards = [TensorBoardLogger(tmp_path / "a"), TensorBoardLogger(tmp_path / "b")]
        found, note = sinks_for([boards[0], CSVLogger(tmp_path), boards[1]], tmp_path)
        assert note == ""
        writer = Writer(found)
        assert writer.image("grid", picture(), 3) == []
        assert writer.close() == []
        for board in boards:
            assert len(events(board.log_dir).Images("grid")) == 1

    def test_dummies_drop_quietly(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        (found,), note = sinks_for([DummyLogger()], tmp_path)
        assert isinstance(found, NullSink)
        assert note == ""
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        (found,), _ = sinks_for([TensorBoardLogger(tmp_path)], tmp_path)
        assert isinstance(found, NullSink)
        writer = Writer([found])
        writer.image("grid", picture(), 1)
        assert writer.close() == []
        assert list(tmp_path.iterdir()) == []


class TestFiles:
    def test_tag_and_step_are_the_path(self, tmp_path: Path) -> None:
        files = FileSink(tmp_path)
        files.image(Picture("deconv/features.3/grid", encode_png(picture()), 40, 60, 12))
        files.text("deconv/channels", "| a |", 12)
        saved = tmp_path / "deconv/features.3/grid/00000012.png"
        assert torch.equal(decode(saved.read_bytes()), picture())
        assert (tmp_path / "deconv/channels/00000012.md").read_text() == "| a |"

    @pytest.mark.parametrize("tag", ["../../grid", "/grid", "a/../../../grid", 'a b:*?"<>|'])
    def test_no_tag_leaves_the_folder(self, tag: str, tmp_path: Path) -> None:
        inside = tmp_path / "inside"
        FileSink(inside).image(Picture(tag, encode_png(picture()), 40, 60, 1))
        assert len(list(inside.rglob("*.png"))) == 1
        assert list(tmp_path.iterdir()) == [inside]


class TestOtherLoggers:
    """What each logger is called with; the real ones are read back where they are installed."""

    def test_comet(self) -> None:
        calls: list[tuple[Any, dict]] = []
        experiment = SimpleNamespace(
            log_image=lambda image, **options: calls.append((to_tensor(image), options)),
            log_text=lambda text, **options: calls.append((text, options)),
        )
        cls = type("CometLogger", (), {"__module__": "pytorch_lightning.loggers.comet"})
        logger = cls()
        logger.experiment = experiment
        found = sink_for(logger)
        assert found is not None
        found.image(Picture("grid", encode_png(picture()), 40, 60, 5))
        found.text("channels", "| a |", 5)
        assert torch.equal(calls[0][0], picture())
        assert calls[0][1] == {"name": "grid", "step": 5}
        assert calls[1] == ("| a |", {"step": 5, "metadata": {"tag": "channels"}})

    def test_wandb_offline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wandb = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_SILENT", "true")
        logger = WandbLogger(save_dir=str(tmp_path), offline=True)
        writer = Writer(sinks_for([logger], tmp_path)[0])
        writer.image("deconv/features.3/grid", picture(), 5, "averaged weights")
        writer.text("deconv/channels", "| a |", 5)
        assert writer.close() == []
        wandb.finish()
        (saved,) = tmp_path.rglob("*.png")
        assert torch.equal(decode(saved.read_bytes()), picture())

    def test_mlflow_local(self, tmp_path: Path) -> None:
        pytest.importorskip("mlflow")
        store = f"sqlite:///{tmp_path}/mlflow.db"
        logger = MLFlowLogger(tracking_uri=store, artifact_location=str(tmp_path))
        writer = Writer(sinks_for([logger], tmp_path)[0])
        writer.image("deconv/features.3/grid", picture(), 5)
        writer.text("deconv/channels", "| a |", 5)
        assert writer.close() == []
        (saved,) = tmp_path.rglob("*.png")
        assert torch.equal(decode(saved.read_bytes()), picture())
        (text,) = tmp_path.rglob("*.md")
        assert text.read_text() == "| a |"


class TestWriter:
    def test_writes_in_order_off_this_thread(self) -> None:
        recorder = Recorder()
        writer = Writer([recorder], most_waiting=3)
        for step in range(20):
            assert writer.image("grid", picture(), step) == []
        assert writer.close() == []
        assert recorder.steps == list(range(20))
        assert recorder.flushed == 1
        assert len(recorder.threads) == 1
        assert threading.get_ident() not in recorder.threads
        assert writer.seconds > 0

    def test_draws_in_its_thread(self) -> None:
        drawn_in = []

        def draw() -> Tensor:
            drawn_in.append(threading.get_ident())
            return picture()

        recorder = Recorder()
        writer = Writer([recorder])
        writer.image("grid", draw, 1)
        writer.close()
        assert recorder.steps == [1]
        assert drawn_in == list(recorder.threads)

    def test_a_failing_sink_keeps_no_other_from_writing(self) -> None:
        broken, whole = Recorder(fail=(1, 2)), Recorder()
        writer = Writer([broken, whole])
        for step in range(4):
            writer.image("grid", picture(), step)
        writer.close()
        assert whole.steps == [0, 1, 2, 3]
        assert broken.steps == [0, 3]

    def test_each_failure_is_reported_once(self) -> None:
        writer = Writer([Recorder(fail=(1, 3))])
        failures = []
        for step in range(5):
            failures += writer.image("grid", picture(), step)
        failures += writer.close()
        assert [(f.tag, f.step, str(f.error)) for f in failures] == [
            ("grid", 1, "disk full at 1"),
            ("grid", 3, "disk full at 3"),
        ]

    def test_a_drawing_that_fails_is_a_failure(self) -> None:
        def draw() -> Tensor:
            raise ZeroDivisionError("no pixels")

        recorder = Recorder()
        writer = Writer([recorder])
        failures = writer.image("grid", draw, 1)
        failures += writer.image("grid", picture(), 2)
        (failure,) = failures + writer.close()
        assert isinstance(failure.error, ZeroDivisionError)
        assert recorder.steps == [2]

    @pytest.mark.parametrize("end", ["drain", "close"])
    def test_what_failed_before_the_end_is_reported_at_the_end(self, end: str) -> None:
        queued, failed = threading.Event(), threading.Event()

        def draw() -> Tensor:
            assert queued.wait(10)
            raise ZeroDivisionError("no pixels")

        class Noting(Writer):
            def _fail(self, *arguments: Any) -> None:
                super()._fail(*arguments)
                failed.set()

        writer = Noting([Recorder()])
        assert not writer.image("grid", draw, 1)
        queued.set()
        assert failed.wait(10)
        assert [failure.tag for failure in getattr(writer, end)()] == ["grid"]
        writer.close()

    def test_a_full_queue_makes_the_caller_wait(self) -> None:
        gate, entered = threading.Event(), threading.Event()

        def draw() -> Tensor:
            entered.set()
            gate.wait(30)
            return picture()

        recorder = Recorder()
        writer = Writer([recorder], most_waiting=2)
        writer.image("grid", draw, 0)
        writer.image("grid", picture(), 1)
        assert entered.wait(30)
        third = threading.Thread(target=writer.image, args=("grid", picture(), 2))
        third.start()
        third.join(0.1)
        assert third.is_alive()
        gate.set()
        third.join(30)
        assert writer.close() == []
        assert recorder.steps == [0, 1, 2]

    def test_a_sink_that_hangs_is_given_up_and_said(self) -> None:
        gate = threading.Event()

        def draw() -> Tensor:
            gate.wait(30)
            return picture()

        writer = Writer([Recorder()], most_waiting=1, patience=0.05)
        assert writer.image("grid", draw, 0) == []
        (dropped,) = writer.image("grid", picture(), 1)
        assert isinstance(dropped.error, TimeoutError)
        assert dropped.step == 1
        late = writer.close()
        assert late
        assert all(isinstance(failure.error, TimeoutError) for failure in late)
        gate.set()

    def test_closed_twice_and_used_after(self) -> None:
        writer = Writer([Recorder()])
        assert writer.close() == []
        assert writer.close() == []
        (failure,) = writer.image("grid", picture(), 1)
        assert "closed" in str(failure.error)

    def test_no_thread_is_left(self) -> None:
        before = set(threading.enumerate())
        writer = Writer([Recorder()])
        writer.image("grid", picture(), 1)
        writer.close()
        for thread in threading.enumerate():
            if thread.name.startswith("lit-deconv-writer"):
                thread.join(10)
        assert set(threading.enumerate()) <= before

    def test_refuses_an_empty_queue(self) -> None:
        with pytest.raises(ValueError, match="most_waiting"):
            Writer([], most_waiting=0)

    @pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "raise RuntimeError()"])
    def test_last_picture_is_whole_without_close(self, end: str, tmp_path: Path) -> None:
        code = (
            "import time, torch\n"
            "from lit_deconv.sinks import FileSink\n"
            "from lit_deconv.writer import Writer\n"
            f"writer = Writer([FileSink({str(tmp_path)!r})])\n"
            "def draw():\n"
            "    time.sleep(0.3)\n"
            "    return torch.zeros(3, 500, 500, dtype=torch.uint8)\n"
            "for step in range(3):\n"
            "    writer.image('grid', draw, step)\n"
            f"{end}\n"
        )
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=not end)
        saved = sorted(tmp_path.rglob("*.png"))
        assert len(saved) == 3
        assert all(not decode(path.read_bytes()).any() for path in saved)


def test_importing_knows_no_logger() -> None:
    code = (
        "import sys, lit_deconv.writer;"
        "print(sorted({m.split('.')[0] for m in sys.modules}"
        " & {'lightning', 'pytorch_lightning', 'tensorboard', 'wandb', 'mlflow'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr

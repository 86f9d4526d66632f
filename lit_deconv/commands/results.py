"""What a run leaves behind: figures, raw reconstructions, their index, a TensorBoard log."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lit_deconv.sinks import Picture, TensorBoardSink
from lit_deconv.version import __version__
from lit_deconv.writer import Failure, Writer

INDEX = "index.json"
LOG = "tensorboard"


class FigureSink:
    """Writes each picture to `folder/tag.png`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def image(self, picture: Picture) -> None:
        """Writes the PNG as it is."""
        path = self.folder / f"{picture.tag}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.png)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Writes the Markdown as it is."""
        (self.folder / f"{tag}.md").write_text(markdown, encoding="utf-8")

    def flush(self) -> None:
        """Files are whole once written."""


class Results:
    """The output folder.

    Args:
        folder: From `prepared_folder`.
        about: What the index says of the whole run.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.index: dict[str, Any] = {
            "lit_deconv": __version__,
            **about,
            "layers": {},
            "figures": [],
            "units": [],
            "complete": False,
        }
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._log = SummaryWriter(str(folder / LOG))
        self._writer = Writer([FigureSink(folder), TensorBoardSink(self._log)])

    def figure(self, layer: str, name: str, draw: Callable[[], Tensor], caption: str) -> None:
        """Draws and writes a figure, in the background."""
        tag = f"{folder_of(layer)}/{self._numbered(layer, name, 'png')}"
        self.index["figures"].append({"layer": layer, "file": f"{tag}.png"})
        _raised(self._writer.image(tag, draw, 0, caption))

    def raw(
        self, layer: str, name: str, arrays: Mapping[str, Tensor], units: list[dict[str, Any]]
    ) -> None:
        """Writes raw reconstructions, one npz, and enters its rows in the index.

        Args:
            layer: Name of the layer.
            name: What it shows; files are numbered.
            arrays: Each with as many rows as there are units.
            units: What stands in each row.
        """
        file = f"{folder_of(layer)}/{self._numbered(layer, name, 'npz')}.npz"
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        numpy = {key: tensor.detach().cpu().numpy() for key, tensor in arrays.items()}
        with path.open("wb") as stream:
            np.savez(stream, **numpy)  # type: ignore[arg-type]
        for row, unit in enumerate(units):
            self.index["units"].append({"layer": layer, **unit, "file": file, "row": row})

    def _numbered(self, layer: str, name: str, kind: str) -> str:
        self._counts[layer, name, kind] += 1
        return f"{name}-{self._counts[layer, name, kind]:03d}"

    def save(self, complete: bool = False) -> None:
        """Brings the index up to what is finished."""
        self.index["complete"] = complete
        path = self.folder / INDEX
        beside = path.with_suffix(".json.part")
        beside.write_text(json.dumps(self.index, indent=1), encoding="utf-8")
        beside.replace(path)

    def close(self, complete: bool) -> None:
        """Finishes the last figure, the log and the index; a folder with nothing in it stays empty."""
        failures = self._writer.close()
        self._log.close()
        if complete or self.index["units"]:
            self.save(complete and not failures)
        else:
            shutil.rmtree(self.folder / LOG)
        _raised(failures)


def prepared_folder(name: str, force: bool) -> Path:
    """The output folder, empty unless the user says that it need not be.

    Raises:
        ValueError: It holds files and `force` is not given.
        OSError: It cannot be written to.
    """
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {name} is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        held = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise OSError(f"cannot write to --output {name}: {error.strerror or error}") from error
    if held and not force:
        raise ValueError(
            f"--output {name} is not empty (it holds {', '.join(held[:3])}"
            f"{', ...' if len(held) > 3 else ''}); name another folder, or overwrite with --force"
        )
    # An older log in the same folder would be shown beside the new one.
    for old in (folder / LOG).glob("events.out.tfevents.*"):
        with suppress(OSError):
            old.unlink()
    return folder


def folder_of(layer: str) -> str:
    """A layer's folder: its name, without what could leave the output folder."""
    return re.sub(r"[^\w.\-]+", "_", layer).lstrip(".") or "layer"


def _raised(failures: list[Failure]) -> None:
    for failure in failures[1:]:
        print(f"{failure.tag}: {failure.error}", file=sys.stderr)
    if failures:
        raise failures[0].error

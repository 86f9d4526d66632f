"""Opens a log folder in TensorBoard in headless Chromium and asserts that its pictures are seen.

Every picture that the event files hold must be known to TensorBoard at every step, and every group
of tags in the Images tab must show cards with loaded pictures that are not flat. Needs Chromium and
its driver (Debian: chromium, chromium-driver) and the extra `browser`.

    python tests/browser/check.py LOGDIR --screenshot PICTURE.png
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import urlencode
from urllib.request import urlopen

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from lit_deconv.commands.tensorboard import EVERY_STEP

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTH, LARGEST_HEIGHT = 1400, 8000
FLAT = 2.0
"""A picture whose luminance deviates less from its mean, in steps of 255, counts as flat."""

# TensorBoard's tabs are web components in each other's shadow roots, which no selector crosses.
ELEMENTS = """
const elements = name => {
    const found = [];
    const search = root => {
        for (const element of root.querySelectorAll('*')) {
            if (element.localName === name) found.push(element);
            if (element.shadowRoot) search(element.shadowRoot);
        }
    };
    search(document);
    return found;
};
"""

OPEN_GROUPS = (
    ELEMENTS
    + """
const groups = elements('tf-category-paginated-view').filter(group => group.category
    && group.category.items && group.category.items.length
    && group.category.metadata && group.category.metadata.type !== 'SEARCH_RESULTS');
for (const group of groups) {
    if (!group.opened) group.shadowRoot.querySelector('button.heading').click();
}
return groups.map(group => [group.category.name, group.category.items.length]);
"""
)

CARDS = (
    ELEMENTS
    + """
return elements('tf-image-loader').map(card => {
    const picture = card.shadowRoot.querySelector('#main-image-container img');
    const loaded = picture !== null && picture.complete && picture.naturalWidth > 0;
    const shown = {run: card.run, tag: card.tag, width: 0, height: 0, mean: 0, deviation: 0};
    if (!loaded) return shown;
    const canvas = document.createElement('canvas');
    canvas.width = shown.width = picture.naturalWidth;
    canvas.height = shown.height = picture.naturalHeight;
    const context = canvas.getContext('2d');
    context.drawImage(picture, 0, 0);
    const rgba = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let sum = 0, squares = 0;
    for (let i = 0; i < rgba.length; i += 4) {
        const luminance = 0.299 * rgba[i] + 0.587 * rgba[i + 1] + 0.114 * rgba[i + 2];
        sum += luminance;
        squares += luminance * luminance;
    }
    const count = rgba.length / 4;
    shown.mean = sum / count;
    shown.deviation = Math.sqrt(Math.max(0, squares / count - shown.mean * shown.mean));
    return shown;
});
"""
)

BOTTOM = (
    ELEMENTS
    + """
return Math.max(...elements('tf-image-loader').map(card => card.getBoundingClientRect().bottom));
"""
)

Logged = dict[str, dict[str, list[int]]]
"""The steps of each picture, by run and tag."""

Found = TypeVar("Found")


class Card(NamedTuple):
    """A picture as the Images tab shows it; width 0 while it has not loaded."""

    run: str
    tag: str
    width: int
    height: int
    mean: float
    deviation: float


def main() -> None:
    """Check a log folder, print what is seen, save a screenshot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--screenshot", type=Path, default=Path("tensorboard.png"))
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds for each wait")
    arguments = parser.parse_args()
    try:
        check(arguments.logdir, arguments.screenshot, arguments.timeout)
    except CheckError as error:
        sys.exit(f"browser check failed: {error}")


class CheckError(Exception):
    """What a person opening TensorBoard would miss."""


def check(logdir: Path, screenshot: Path, timeout: float) -> None:
    """Open `logdir` as a user would and look at every group of pictures.

    Args:
        logdir: folder with event files, at any depth.
        screenshot: where the picture of the Images tab goes.
        timeout: seconds for each wait.

    Raises:
        CheckError: a picture that was logged is not shown.
    """
    logged = logged_pictures(logdir)
    with tensorboard(logdir, timeout) as url, chromium() as driver:
        wait("every step of every picture in TensorBoard", timeout, lambda: has(url, logged))
        driver.set_window_size(WIDTH, 1200)
        driver.get(f"{url}#images")
        names = {
            tag.split("/")[0] if "/" in tag else "" for tags in logged.values() for tag in tags
        }

        def groups_open() -> list[tuple[str, int]]:
            groups = [(name, count) for name, count in driver.execute_script(OPEN_GROUPS)]
            return groups if {name for name, _ in groups} >= names else []

        wait(f"the groups {sorted(names)} in the Images tab", timeout, groups_open)

        def cards_loaded() -> list[Card]:
            cards = [Card(**card) for card in driver.execute_script(CARDS)]
            shown = {card.tag.split("/")[0] if "/" in card.tag else "" for card in cards}
            return cards if shown >= names and all(card.width for card in cards) else []

        cards = wait("a loaded picture on every card", timeout, cards_loaded)
        driver.set_window_size(WIDTH, min(LARGEST_HEIGHT, int(driver.execute_script(BOTTOM)) + 200))
        time.sleep(1)  # lets the wider window settle before it is photographed
        screenshot.parent.mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(screenshot))
    for card in cards:
        print(
            f"{card.run}  {card.tag}  {card.width} x {card.height}  "
            f"luminance {card.mean:.0f} +- {card.deviation:.0f}"
        )
        if card.tag not in logged.get(card.run, {}):
            raise CheckError(f"a card shows {card.tag!r} of run {card.run!r}, which was not logged")
        if card.deviation < FLAT:
            raise CheckError(f"the picture {card.tag!r} of run {card.run!r} is flat")
    steps = sorted({len(steps) for tags in logged.values() for steps in tags.values()})
    print(f"{len(cards)} cards in {len(names)} groups, {steps} steps each; see {screenshot}")


def logged_pictures(logdir: Path) -> Logged:
    """Read from the event files what there is to be shown, with TensorBoard's own reader."""
    if not logdir.is_dir():
        raise CheckError(f"there is no folder {logdir}")
    reader = EventMultiplexer(size_guidance={"images": 0})  # here, 0 does mean all
    reader.AddRunsFromDirectory(str(logdir))
    reader.Reload()
    logged = {
        run: {tag: [image.step for image in reader.Images(run, tag)] for tag in kinds["images"]}
        for run, kinds in reader.Runs().items()
    }
    if not any(logged.values()):
        raise CheckError(f"the event files in {logdir} hold no pictures")
    return logged


def has(url: str, logged: Logged) -> bool:
    """Whether the TensorBoard at `url` offers every step of every picture."""
    for run, tags in logged.items():
        for tag, steps in tags.items():
            query = urlencode({"run": run, "tag": tag, "sample": 0})
            with urlopen(f"{url}data/plugin/images/images?{query}", timeout=30) as answer:
                offered = [entry["step"] for entry in json.load(answer)]
            if sorted(offered) != sorted(steps):
                return False
    return True


def wait(what: str, timeout: float, ready: Callable[[], Found]) -> Found:
    """Ask until the answer is true; say what was waited for where it never is."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            answer, reason = ready(), ""
        except Exception as error:  # the server or the page is still starting
            answer, reason = None, f" ({type(error).__name__}: {str(error).splitlines()[0]})"
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise CheckError(f"after {timeout:.0f} s still not there: {what}{reason}")
        time.sleep(0.5)


@contextmanager
def tensorboard(logdir: Path, timeout: float) -> Iterator[str]:
    """Run TensorBoard on a free loopback port; gives its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), *EVERY_STEP]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    # A pipe that nobody reads would fill and stop the server.
    threading.Thread(target=lambda: said.extend(server.stderr or ()), daemon=True).start()

    def address() -> str | None:
        found = re.search(r"http://[^\s/]+/", "".join(said))
        return found.group() if found else None

    try:
        yield wait("TensorBoard's address", timeout, address) or ""
    finally:
        server.terminate()
        server.wait(10)


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """Start Chromium with a profile of its own, which is thrown away."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        raise CheckError("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = Options()
    options.binary_location = browser
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        session = webdriver.Chrome(options=options, service=Service(driver))
        try:
            yield session
        finally:
            session.quit()


if __name__ == "__main__":
    main()

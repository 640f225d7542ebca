"""`ckptfs status --watch`: mounts as they work, on a terminal as a picture, elsewhere a line for each look.

Owns the picture, the keys and what can only be known from two looks (speed, time left). Asks mounts for their status
and nothing else; imports rich when there is a terminal. Called by `ckptfs status`.
"""

import contextlib
import json
import os
import select
import signal
import sys
import termios
import time
import tty
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ckptfs.cli.status import place_of, safe
from ckptfs.errors import MountError, UnavailableError
from ckptfs.terminal import size_text

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

Facts = dict[str, Any]
Look = Callable[[], list[Facts]]  # the status of every mount that is watched, in detail

_WINDOW = 3.0  # seconds over which the present speed is measured
_END = {b"q", b"Q", b"\x04", b""}  # Ctrl-D; nothing: the terminal is gone
_ERRORS = 3
_SIDE_BY_SIDE = 3  # mounts that are shown in full; more get a line each


def watch(look: Look, interval: float, *, as_json: bool, only: bool) -> None:
    """Until q, Ctrl-C, or the end of the mount if there is `only` one to watch."""
    speeds = Speeds()
    with contextlib.suppress(KeyboardInterrupt), _terminated():
        found = look()  # what is wrong from the beginning is told as such
        if as_json:
            _each(found, look, interval, lambda mounts: click.echo(json.dumps(mounts[0] if only else mounts)))
        elif sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            _screen(found, look, interval, speeds)
        else:
            _each(found, look, interval, lambda mounts: _say(mounts, speeds))


class Speeds:
    """Bytes per second of mounts, out of their last statuses."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, int], deque[tuple[float, int]]] = {}

    def add(self, facts: Facts) -> None:
        samples = self._samples.setdefault((facts["mountpoint"], facts["pid"]), deque())
        samples.append((time.monotonic(), facts["network"]["bytes"]))
        while len(samples) > 2 and samples[-1][0] - samples[0][0] > _WINDOW:
            samples.popleft()

    def now(self, facts: Facts) -> float:
        """Over the last seconds; since the mount began where there was but one look."""
        samples = self._samples.get((facts["mountpoint"], facts["pid"]), deque())
        if len(samples) < 2 or samples[-1][0] <= samples[0][0]:
            return self.mean(facts)
        return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])

    @staticmethod
    def mean(facts: Facts) -> float:
        return float(facts["network"]["bytes"] / facts["seconds"]) if facts["seconds"] else 0.0

    def left(self, facts: Facts) -> str:
        """Until all is here, for people; what nobody fetches has no end, a layer store none: its images come and go."""
        if "images" in facts:
            return "a layer store"
        missing = facts["image_bytes"] - facts["cached_bytes"]
        if not missing:
            return "all here"
        if not facts["background"]:
            return "on demand"
        speed = self.now(facts)
        return f"{_duration(missing / speed)} left" if speed > 0 and missing / speed < 359_999 else "stands still"


def line_of(facts: Facts, speeds: Speeds) -> str:
    """A mount in one line."""
    if "state" in facts:
        return f"{safe(facts['mountpoint'])}  {safe(facts['state'])}"
    reads = facts["reads"]
    parts = [
        safe(facts["mountpoint"]),
        *_share(facts),
        f"{size_text(speeds.now(facts))}/s",
        f"{reads['count']} reads",
        f"{_percent(reads['count'] - reads['misses'], reads['count'])} hits",
    ]
    if facts["reading"] and facts["reading"][0]["wait_ms"] is not None:
        longest = facts["reading"][0]
        parts.append(f"{reads['waiting']} waiting, {longest['wait_ms'] / 1000:.2f} s for {place_of(longest)}")
    parts.append(speeds.left(facts))
    if facts["errors"]:
        parts.append(f"error: {safe(facts['errors'][-1])}")
    return "  ".join(parts)


def _share(facts: Facts) -> list[str]:
    images = [f"{len(facts['images'])} images"] if "images" in facts else []
    cached, size = facts["cached_bytes"], facts["image_bytes"]
    return [*images, _percent(cached, size), f"{size_text(cached)} of {size_text(size)}"]


def _each(found: list[Facts], look: Look, interval: float, show: Callable[[list[Facts]], None]) -> None:
    with contextlib.suppress(MountError, UnavailableError):  # it was there at first: now it has ended
        while True:
            show(found)
            sys.stdout.flush()
            time.sleep(interval)
            found = look()


def _say(mounts: Sequence[Facts], speeds: Speeds) -> None:
    now = time.strftime("%H:%M:%S")
    for facts in mounts:
        if "state" not in facts:
            speeds.add(facts)
        click.echo(f"{now}  {line_of(facts, speeds)}")
    if not mounts:
        click.echo(f"{now}  no mounts")


# -- on a terminal -----------------------------------------------------------------------------------------------------


def _screen(found: list[Facts], look: Look, interval: float, speeds: Speeds) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    ended = ""
    with _keys() as end_wanted, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            for facts in found:
                if "state" not in facts:
                    speeds.add(facts)
            live.update(picture(found, speeds, console.width), refresh=True)
            if end_wanted(interval):
                break
            try:
                found = look()
            except (MountError, UnavailableError):
                ended = "the mount has ended"
                break
    for facts in found:  # the picture is gone with its screen
        click.echo(line_of(facts, speeds))
    if ended:
        click.echo(ended)


def picture(mounts: Sequence[Facts], speeds: Speeds, width: int) -> "Group":
    """All mounts, for a terminal that is `width` columns wide."""
    from rich.console import Group
    from rich.text import Text

    blocks: list[Any] = []
    for facts in mounts:
        if "state" in facts or len(mounts) > _SIDE_BY_SIDE:
            blocks.append(Text(line_of(facts, speeds), no_wrap=True, overflow="ellipsis"))
        else:
            blocks += [*_mount(facts, speeds, width), Text()]
    if not mounts:
        blocks.append(Text("no mounts"))
    return Group(*blocks, Text(f"{time.strftime('%H:%M:%S')}  q ends", style="dim"))


def _mount(facts: Facts, speeds: Speeds, width: int) -> Iterator[Any]:
    from rich.table import Table
    from rich.text import Text

    title = Text(safe(facts["mountpoint"]), style="bold", overflow="fold")
    title.append(f"  {safe(facts['reference'])}  {facts['view']}, {_duration(facts['seconds'])}", "not bold")
    yield title
    yield _bars(facts, speeds, width)
    network, reads = facts["network"], facts["reads"]
    rows = Table.grid(padding=(0, 1))
    rows.add_column(style="dim", no_wrap=True, min_width=8)
    rows.add_column(overflow="fold")
    retries = f", {network['retries']} retries, {network['errors']} failed" if network["retries"] else ""
    rows.add_row(
        "speed",
        f"{size_text(speeds.now(facts))}/s now, {size_text(speeds.mean(facts))}/s on average, "
        f"{network['in_flight']} requests under way{retries}",
    )
    rows.add_row("reads", _reads(reads))
    for error in facts["errors"][-_ERRORS:]:
        rows.add_row(Text("error", style="red"), Text(safe(error), style="red"))
    yield rows
    yield _reading(facts["reading"])


def _reads(reads: Facts) -> str:
    if not reads["count"]:
        return "none yet"
    shares = ", ".join(
        f"{_percent(reads[key], reads['count'])} from {where}"
        for key, where in (("memory_hits", "memory"), ("disk_hits", "disk"), ("misses", "the network"))
    )
    waits = f"median wait {reads['wait_ms_p50']:.1f} ms, 99 % below {reads['wait_ms_p99']:.1f} ms"
    return f"{reads['count']} ({size_text(reads['bytes'])}): {shares}" + (f"; {waits}" if reads["misses"] else "")


def _bars(facts: Facts, speeds: Speeds, width: int) -> "Table":
    """The image, and under it what its files are for; layers where there is more than one and that is not known."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    parts: list[tuple[str, int | None, int, str]] = [
        ("image", facts["cached_bytes"], facts["image_bytes"], speeds.left(facts))
    ]
    images = facts.get("images", ())  # of a layer store
    parts += [(safe(image["reference"]), image["cached_bytes"], image["image_bytes"], "") for image in images]
    roles = facts["roles"].items()
    parts += [(name, role["cached_bytes"], role["bytes"], "") for name, role in roles if len(roles) > 1]
    if not roles:
        parts += [(safe(layer["name"])[:24], layer["cached_bytes"], layer["bytes"], "") for layer in facts["layers"]]
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True, style="dim", min_width=8)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right", min_width=5)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for name, cached, size, note in parts:
        if cached is None:
            table.add_row(name, "", "", size_text(size), note)
            continue
        bar = ProgressBar(total=max(size, 1), completed=cached if size else 1, width=max(10, min(40, width - 50)))
        table.add_row(name, bar, _percent(cached, size), f"{size_text(cached)} of {size_text(size)}", note)
    return table


def _reading(reading: Sequence[Facts]) -> "Table":
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True, min_width=8)
    table.add_column(overflow="fold")
    for _ in range(2):
        table.add_column(no_wrap=True)
    for read in reading[:8]:
        waits = read["wait_ms"] is not None
        who = f"{safe(read['command'])} {read['pid']}" if read["pid"] else ""
        style = "yellow" if waits else ""
        since = f"{read['wait_ms'] / 1000:.2f} s" if waits else ""
        table.add_row("waiting" if waits else "reading", place_of(read), who, since, style=style)
    if len(reading) > 8:
        table.add_row("", f"and {len(reading) - 8} more", "", "")
    return table


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits that many seconds and says whether a key wants the end. The terminal is as before after."""
    if not sys.stdin.isatty():

        def sleep(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield sleep
        return
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)

    def end_wanted(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([fd], [], [], left)[0] and os.read(fd, 1) in _END:
                return True
        return False

    tty.setcbreak(fd)
    try:
        yield end_wanted
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM ends the block like an exception, so that the terminal is put in order first."""

    def leave(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- words -------------------------------------------------------------------------------------------------------------


def _percent(part: int, whole: int) -> str:
    """Never 100 before all is there."""
    return f"{100 * part // whole if whole else 100} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"

"""What `status --watch` makes of figures: speeds, time left, and names that want to act on a terminal."""

from typing import Any

import pytest
from rich.console import Console

from ckptfs.cli import watch
from ckptfs.cli.watch import Speeds, line_of, picture

READ: dict[str, Any] = {"path": "checkpoint/pages-1.img", "offset": 4096, "length": 512, "pid": 7, "command": "criu"}


def facts(**more: Any) -> dict[str, Any]:
    network = {"requests": 1, "bytes": 0, "retries": 0, "errors": 0, "in_flight": 0, **more.pop("network", {})}
    reads = {"count": 4, "bytes": 9, "memory_hits": 2, "disk_hits": 1, "misses": 1, "waiting": 0, "waits": 1}
    return {
        "mountpoint": "/mnt", "reference": "host/x:1", "pid": 1, "view": "checkpoint", "seconds": 10.0,
        "background": True, "image_bytes": 1000, "cached_bytes": 400, "network": network, "errors": [],
        "reads": {**reads, "wait_ms_p50": 1.0, "wait_ms_p99": 2.0}, "layers": [], "roles": {}, "reading": [], **more,
    }  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def test_speed_is_that_of_the_last_seconds(clock: list[float]) -> None:
    speeds = Speeds()
    speeds.add(facts(network={"bytes": 500}))
    assert speeds.now(facts(network={"bytes": 500})) == 50, "one look: since the beginning"
    for received in (600, 700, 800, 2800, 4800, 6800):
        clock[0] += 1
        speeds.add(facts(network={"bytes": received}))
    assert speeds.now(facts()) == 2000
    assert speeds.left(facts(image_bytes=200_000, cached_bytes=0)) == "1 min 40 s left"
    other = facts(pid=2, network={"bytes": 10})
    assert speeds.now(other) == 1, "another daemon at the same place starts anew"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cached_bytes": 1000}, "all here"),
        ({"background": False}, "on demand"),
        ({}, "stands still"),
        ({"network": {"bytes": 100}}, "1 min 00 s left"),
        ({"network": {"bytes": 100}, "image_bytes": 100_000}, "2 h 46 min left"),
    ],
)
def test_time_left(more: dict[str, Any], words: str) -> None:
    assert Speeds().left(facts(**more)) == words


def shown(*mounts: dict[str, Any], width: int = 100) -> str:
    console = Console(width=width, highlight=False, force_terminal=False)
    with console.capture() as out:
        console.print(picture(mounts, Speeds(), width))
    return out.get()


def test_nothing_in_a_name_acts_on_the_terminal() -> None:
    nasty = "\x1b[2J[red]a\udcff\u202eb\n"
    read = {**READ, "path": nasty, "command": nasty, "wait_ms": 40.0}
    text = shown(facts(mountpoint=nasty, reference=nasty, errors=[nasty], reading=[read]))
    assert "\x1b" not in text and "\u202e" not in text and r"\x1b[2J[red]a\xff\u202eb" in text
    assert "\x1b" not in line_of(facts(mountpoint=nasty, errors=[nasty], reading=[read]), Speeds())


def test_a_percent_more_is_only_said_when_it_is_there() -> None:
    assert " 99 %" in shown(facts(image_bytes=100_000, cached_bytes=99_999))
    assert "100 %" in shown(facts(cached_bytes=1000))
    assert "100 %" in shown(facts(image_bytes=0, cached_bytes=0))


def test_layers_while_it_is_not_known_what_files_there_are() -> None:
    layers = [{"name": "gzip sha256:0123456789abcdef", "bytes": 600, "cached_bytes": None}]
    text = shown(facts(layers=layers))
    assert "gzip sha256:0123456789" in text and "600 B" in text


def test_many_mounts_get_a_line_each_and_dead_ones_too() -> None:
    many = [facts(mountpoint=f"/mnt/{number}") for number in range(5)]
    lines = shown(*many, {"mountpoint": "/mnt/x", "state": "dead; run: ckptfs umount /mnt/x"}).splitlines()
    assert len(lines) == 7 and lines[5].startswith("/mnt/x  dead") and "no mounts" in shown()


def test_a_layer_store_has_images_and_no_end() -> None:
    image = {"reference": "host/base:1", "image_bytes": 600, "cached_bytes": 300}
    store = facts(images=[image], view="layers", network={"bytes": 100})
    text = shown(store)
    assert "host/base:1" in text and "50 %" in text and "300 B of 600 B" in text and "a layer store" in text
    line = line_of(store, Speeds())
    assert "1 images  40 %  400 B of 1000 B" in line and "a layer store" in line


def test_more_reads_than_there_is_room_for() -> None:
    assert "and 12 more" in shown(facts(reading=[{**READ, "wait_ms": 1.0}] * 20))

"""R1: `ckptfs restore` of a container of podman over the link, by runc and by podman: from the command until it runs.

Each run starts with an empty cache, looks inside for what the container had changed, and for what is left behind.
Repeated twenty times: it has to work every time, so the slowest counts as much as the median.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.lab import SLOW, Lab
from bench.rows import Row
from tests.support.podman import BASE, Podman
from tests.support.restored import assert_delta, assert_nothing_left, restored, start
from tests.support.tools import wait_for

_RUNS, _FEW = 20, 3
_IMAGE, _BASE = "bench/container:256", "bench/container-base:1"
_NAME = "again"
_EAGER = "podman pull, podman container restore"
_WARM = "import ckptfs.cli.restore, ckptfs.restore.container, ckptfs.restore.podman, ckptfs.daemon.serve_image"


@dataclass(frozen=True)
class _Container:
    """What is in the registry. `last_tick` is where it was when it was dumped, at most."""

    podman: Podman
    last_tick: int


def _measure(lab: Lab) -> None:
    runs = _FEW if lab.quick else _RUNS
    with lab.room() as room, Podman(lab.isolation, room) as podman:
        container = _publish(lab, room, podman)
        conditions = {**SLOW.conditions, "megabytes": lab.standard}
        eager = [_eagerly(lab, container) for _ in range(max(lab.few, 1))]
        for number, took in enumerate(eager):
            lab.sample("R1", _EAGER, number, conditions, running=took)
        for way, limit, once in (("runc", 1.0, _by_runc), ("podman, unmodified", 2.0, _by_podman)):
            values = []
            for number in range(runs):
                values.append(once(lab, container))
                lab.sample("R1", way, number, conditions, running=values[-1])
            peer = {"peer": _EAGER, "peer_value": median(eager)}
            lab.figure("R1", f"restore until it runs, {way}", values, "s", limit=limit, **peer)
            lab.figure("R1", f"the slowest of {runs}, {way}", [max(values)], "s", limit=limit)


def _publish(lab: Lab, room: Path, podman: Podman) -> _Container:
    lab.say(f"  a container of {lab.standard} MB, checkpointed by podman and pushed …")
    podman.build_base()
    podman.push(BASE, lab.registry.reference(_BASE))
    podman.run_ticker("counter", lab.standard)
    archive = room / "counter.tar"
    podman("container", "checkpoint", f"--export={archive}", "--compress=none", "--leave-running", "counter")
    last = podman.ticks("counter")[-1].number
    podman("rm", "--force", "--time=0", "counter")
    lab.publish(archive, _IMAGE)
    archive.unlink()
    return _Container(podman, last)


def _cold(lab: Lab, container: _Container, *images: str) -> None:
    """As `Lab.cold`; what a node in use has in memory is here the runtime, the engine and our own restore as well."""
    for image in images:
        lab.cold(image)
    subprocess.run([sys.executable, "-c", _WARM], check=True)
    for command in (("runc", "restore", "--help"), ("iptables-restore", "--version"), ("ip", "-Version")):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    container.podman("container", "restore", "--help")
    container.podman("ps")


def _by_runc(lab: Lab, container: _Container) -> float:
    """Seconds until the command says that it runs."""
    with lab.room() as room, lab.link(SLOW) as link:
        _cold(lab, container, _BASE, _IMAGE)
        began = time.monotonic()
        with restored(room, f"{link.address}/{_IMAGE}", "--base", f"{link.address}/{_BASE}") as found:
            took = time.monotonic() - began
            found.assert_continues(container.last_tick)
            found.assert_delta()
        assert (found.code, found.err) == (0, "")
        return took


def _by_podman(lab: Lab, container: _Container) -> float:
    podman = container.podman
    with lab.room() as room, lab.link(SLOW) as link:
        settings = room / "containers.conf"
        settings.write_text('[engine]\nruntime="runc"\ncgroup_manager="cgroupfs"\nevents_logger="file"\n')
        os.environ["CONTAINERS_CONF"] = str(settings)
        _cold(lab, container, _IMAGE)
        began, clock = time.monotonic(), time.time()
        words = (f"{link.address}/{_IMAGE}", "--engine", "podman", "--name", _NAME)
        try:
            process = start(room, *words, prefix=podman.isolation.enter)
            assert process.stdout is not None
            first = process.stdout.readline()
            took = time.monotonic() - began
            out, err = process.communicate(timeout=120)
            if process.returncode or not first:
                raise RuntimeError(err)
            assert json.loads(first)["lazy"]
            assert json.loads(out)["event"] == "resident"
            new = wait_for("a tick", lambda: [t.number for t in podman.ticks(_NAME) if t.at > clock], patience=60)
            assert 0 < new[0] <= container.last_tick + 1
            assert new == list(range(new[0], new[0] + len(new)))
            assert_delta(podman.isolation.path(podman("mount", _NAME)))
            assert_nothing_left(room)
        finally:
            del os.environ["CONTAINERS_CONF"]
            podman("rm", "--force", "--time=0", "--ignore", _NAME)
        return took


def _eagerly(lab: Lab, container: _Container) -> float:
    """Seconds until podman says that it runs, which takes the whole image first."""
    podman = container.podman
    image = lab.conventional(_IMAGE)
    with lab.link(SLOW) as link:
        _cold(lab, container, image)
        reference = f"{link.address}/{image}"
        began = time.monotonic()
        try:
            podman("pull", "--quiet", "--tls-verify=false", reference)
            podman("container", "restore", "--name", _NAME, reference)
            return time.monotonic() - began
        finally:
            podman("rm", "--force", "--time=0", "--ignore", _NAME)
            podman("rmi", "--force", "--ignore", reference)


ROW = Row("R1", "A container of podman runs again", _measure, ("podman", "runc", "criu"))

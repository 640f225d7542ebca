"""P9: from `ckptfs mount` until a program has read 200 pages, scattered over its memory, one after another.

Once with the profile of an earlier restore attached to the image, once without: two repositories with the same image,
mounted in turns. What DADI and REAP have published for recorded working sets is 4.0 and 3.7 times; the peer that is
measured pulls everything first.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from bench.flows import EAGER, restoring, status_of
from bench.lab import SLOW, Image, Lab
from bench.rows import Row
from tests.support.command import ckptfs
from tests.support.criu import RestoredProcess, restore
from tests.support.images import extract
from tests.support.tools import run, wait_for

_COLD = "ckptfs, no profile"
_RECORDED = "ckptfs, with profile"


def _measure(lab: Lab) -> None:
    image = lab.image(workload="scattered")
    recorded = replace(image, repository=image.repository.replace("scattered", "recorded"))
    insecure = ("--src-tls-verify=false", "--dest-tls-verify=false")
    here = [f"docker://{each.reference(lab.registry.host)}" for each in (image, recorded)]
    run("skopeo", "copy", "--quiet", "--preserve-digests", *insecure, *here, timeout=600)
    _record(lab, recorded)
    ratios, first, done = [], [], []
    for number in range(max(lab.runs, 5)):
        cold = _until_touched(lab, image, _COLD, number)
        done.append(_until_touched(lab, recorded, _RECORDED, number))
        ratios.append(cold / done[-1])
        first.append(cold)
    eager = [_eagerly(lab, image, number) for number in range(lab.few)]
    pulled = lab.figure("P9", f"{EAGER}: working set read", eager, "s")
    lab.figure("P9", f"{_COLD}: working set read", first, "s", peer=EAGER, peer_value=pulled.value)
    lab.figure("P9", f"{_RECORDED}: working set read", done, "s", peer=EAGER, peer_value=pulled.value)
    peer = {"peer": "DADI, as published", "peer_value": 4.0}
    lab.figure("P9", "time without profile ÷ with profile", ratios, "×", limit=4, least=True, **peer)


def _record(lab: Lab, image: Image) -> None:
    """`ckptfs profile record` and `push`; the command that it runs waits while we restore beside it."""
    with lab.room() as room:
        profile, mountpoint, over = room / "profile.json", room / "mountpoint", room / "over"
        wait = f'echo "$CKPTFS_MOUNT" > {mountpoint}; while [ ! -e {over} ]; do sleep 0.02; done'
        command = [sys.executable, "-m", "ckptfs", "profile", "record", image.reference(lab.registry.host), "--quiet"]
        command += ["--out", str(profile), "--cache-dir", str(room / "cache"), "--", "sh", "-c", wait]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as recording:
            try:
                wait_for("the mount", lambda: mountpoint.exists() and mountpoint.read_text().endswith("\n"))
                images = Path(mountpoint.read_text().strip()) / "checkpoint"
                with restore(image.checkpoint, room / "work", images=images, lazy=True) as restored:
                    restored.first_tick()
                    _touch(restored)
            finally:
                over.touch()
        assert recording.returncode == 0
        pushed = ckptfs("profile", "push", profile, image.reference(lab.registry.host))
        assert pushed.code == 0, pushed.err


def _until_touched(lab: Lab, image: Image, flow: str, number: int) -> float:
    with restoring(lab, image, SLOW, lazy=True) as running:
        first = running.restored.first_tick().at - running.began
        done = _touch(running.restored) - running.began
        fetched = running.link.stats().bytes_down
        status = status_of(running.mount)
    assert (status["profile"] is not None) == (flow == _RECORDED)
    conditions = {**SLOW.conditions, "megabytes": image.megabytes}
    values = {"first_tick": first, "touched": done, "bytes": fetched, "misses": status["reads"]["misses"]}
    lab.sample("P9", flow, number, conditions, **values)
    return done


def _eagerly(lab: Lab, image: Image, number: int) -> float:
    theirs = lab.conventional(image.repository)
    with lab.room() as room, lab.link(SLOW) as link:
        lab.cold(theirs)
        began = time.time()
        images = extract(f"{link.address}/{theirs}", room / "eager") / "checkpoint"
        with restore(image.checkpoint, room / "work", images=images) as restored:
            restored.first_tick()
            done = _touch(restored) - began
        shutil.rmtree(room / "eager")
    lab.sample("P9", EAGER, number, {**SLOW.conditions, "megabytes": image.megabytes}, touched=done)
    return done


def _touch(restored: RestoredProcess) -> float:
    """When the process has read its working set, on the real-time clock."""
    role, pid = next(iter(restored.checkpoint.pids.items()))
    offset = restored.output.size()
    os.kill(pid, signal.SIGUSR2)
    return wait_for(
        "the working set",
        lambda: restored.output.lines(role=role, what="touched", offset=offset),
        patience=120,
        step=0.001,
    )[0].at


ROW = Row("P9", "A scattered working set", _measure, ("criu", "skopeo"))

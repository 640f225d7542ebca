"""P6: requests that have to wait for one another until all metadata of the checkpoint is on the node.

Measured twice: as the mount counts them, and from outside, as time on a link of one second: what the delay adds to
`ckptfs mount` and to reading every metadata file, in round trips, less the one of connection set-up. The peer is
`skopeo copy` of the same image by the second measure; the image is small, so that no transfer waits for windows.
"""

import statistics
import time

from bench.flows import status_of
from bench.lab import Image, Lab, LinkShape
from bench.rows import Row
from ckptfs.bench.reading import Reading, reading_of, replay
from tests.support.command import mounted
from tests.support.tools import run

_RTT = 1.0
_MEGABYTES = 4
_SET_UP = 1  # TCP's handshake


def _measure(lab: Lab) -> None:
    image = lab.image(_MEGABYTES)
    with lab.room() as room, mounted(image.reference(lab.registry.host), room) as mount:
        reading = reading_of(mount.path, lazy=True)
    metadata = Reading("metadata", reading.start[:1])
    counted: list[float] = []
    ours = [_mounting(lab, image, metadata, _RTT, counted), _mounting(lab, image, metadata, 0.0, [])]
    skopeo = [_copying(lab, image, rtt) for rtt in (_RTT, 0.0)]
    by_time, by_skopeo = ((slow - fast) / _RTT - _SET_UP for slow, fast in (ours, skopeo))
    peer = {"peer": "skopeo copy, by time", "peer_value": by_skopeo}
    lab.figure("P6", "round trips to a ready mount, as it counts", counted, "", limit=2, **peer)
    name = "round trips until all metadata is read, by time"
    lab.figure("P6", name, [by_time], "", limit=2, **peer)


def _mounting(lab: Lab, image: Image, metadata: Reading, rtt: float, counted: list[float]) -> float:
    took = []
    for number in range(3):
        with lab.room() as room, lab.link(LinkShape(rtt, 0)) as link:
            lab.cold(image.repository)
            began = time.time()
            with mounted(image.reference(link.address), room, "--no-background-fetch") as mount:
                replay(mount.path, metadata.start)
                took.append(time.time() - began)
                counted.append(status_of(mount)["round_trips_to_ready"])
        lab.sample("P6", "ckptfs mount, metadata read", number, {"rtt_ms": rtt * 1000}, seconds=took[-1])
    return statistics.median(took)


def _copying(lab: Lab, image: Image, rtt: float) -> float:
    took = []
    for number in range(3):
        with lab.room() as room, lab.link(LinkShape(rtt, 0)) as link:
            lab.cold(image.repository)
            began = time.time()
            source = f"docker://{image.reference(link.address)}"
            run("skopeo", "copy", "--quiet", "--src-tls-verify=false", source, f"dir:{room}/copy")
            took.append(time.time() - began)
        lab.sample("P6", "skopeo copy", number, {"rtt_ms": rtt * 1000}, seconds=took[-1])
    return statistics.median(took)


ROW = Row("P6", "Round trips to a ready mount", _measure, ("criu", "skopeo"))

"""Lazy against eager over the size of the image, the bandwidth and the round-trip time: one run at each point."""

from bench.flows import EAGER, LAZY, PLAIN, eagerly, through_mount
from bench.lab import SLOW, Image, Lab, LinkShape
from bench.rows import Row


def _measure(lab: Lab) -> None:
    for megabytes in lab.sizes:
        _all_flows(lab, lab.image(megabytes), SLOW)
    image = lab.image(lab.sizes[0] if lab.quick else lab.standard)
    for rate in (50e6, 1e9) if lab.quick else (50e6, 100e6, 400e6, 1e9):
        _all_flows(lab, image, LinkShape(SLOW.rtt, rate))
    for rtt in (0.002, 0.100) if lab.quick else (0.002, 0.050, 0.100, 0.200):
        _all_flows(lab, image, LinkShape(rtt, SLOW.rate))
    _all_flows(lab, image, SLOW)


def _all_flows(lab: Lab, image: Image, shape: LinkShape) -> None:
    conditions = {**shape.conditions, "megabytes": image.megabytes}
    for flow, lazy in ((LAZY, True), (PLAIN, False)):
        found = through_mount(lab, image, shape, lazy=lazy)
        lab.sample("links", flow, 0, conditions, **found.values())
        lab.say(f"  {conditions}: {flow}: first tick {found.first_tick:.2f} s")
    eager = eagerly(lab, image, shape)
    lab.sample("links", EAGER, 0, conditions, **eager.values())
    lab.say(f"  {conditions}: {EAGER}: first tick {eager.first_tick:.2f} s")


ROW = Row("links", "Over size, bandwidth and delay", _measure, ("criu", "skopeo"))

"""Status of mounts in Prometheus' text format (exposition format 0.0.4): for its textfile collector and for /metrics.

Owns names, units and help of the metrics; every value is a field of a mount's status. Called by `ckptfs status` and by
the metrics port of a mount.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_QUANTILES = (("0.5", "wait_ms_p50"), ("0.99", "wait_ms_p99"))


class _Metric(NamedTuple):
    name: str
    kind: str
    help: str
    path: tuple[str, ...]  # of the field in a mount's status
    divisor: int = 1


_METRICS = (
    _Metric("ckptfs_image_bytes", "gauge", "Compressed bytes of the layers of the view.", ("image_bytes",)),
    _Metric("ckptfs_cached_bytes", "gauge", "How many of them this node has.", ("cached_bytes",)),
    _Metric("ckptfs_complete", "gauge", "1 when all of them are here.", ("complete",)),
    _Metric("ckptfs_ready_seconds", "gauge", "From the command to the first possible read.", ("ready_ms",), 1000),
    _Metric("ckptfs_network_requests_total", "counter", "Requests sent.", ("network", "requests")),
    _Metric("ckptfs_network_bytes_total", "counter", "Body bytes received.", ("network", "bytes")),
    _Metric("ckptfs_network_retries_total", "counter", "Requests sent again.", ("network", "retries")),
    _Metric("ckptfs_network_errors_total", "counter", "Requests given up.", ("network", "errors")),
    _Metric("ckptfs_network_in_flight", "gauge", "Requests under way.", ("network", "in_flight")),
    _Metric("ckptfs_reads_total", "counter", "Reads answered.", ("reads", "count")),
    _Metric("ckptfs_read_bytes_total", "counter", "Bytes served.", ("reads", "bytes")),
    _Metric("ckptfs_read_memory_hits_total", "counter", "Reads answered from memory.", ("reads", "memory_hits")),
    _Metric("ckptfs_read_disk_hits_total", "counter", "Reads answered from the node's cache.", ("reads", "disk_hits")),
    _Metric("ckptfs_read_misses_total", "counter", "Reads that waited for the network.", ("reads", "misses")),
    _Metric("ckptfs_reads_waiting", "gauge", "Reads that wait for the network now.", ("reads", "waiting")),
    _Metric(
        "ckptfs_prefetched_bytes_total", "counter", "Bytes fetched before they were asked for.", ("prefetch", "bytes")
    ),
    _Metric("ckptfs_prefetched_used_bytes_total", "counter", "Of these, read later.", ("prefetch", "used_bytes")),
)


def exposition(mounts: Sequence[dict[str, Any]]) -> str:
    """The text for all mounts; a mount whose daemon is dead has only `ckptfs_up 0`."""
    return "".join(f"{line}\n" for line in _lines(mounts)).encode("utf-8", "backslashreplace").decode()


def _lines(mounts: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from _head("ckptfs_up", "gauge", "Whether the daemon of the mount answers.")
    for mount in mounts:
        yield f"ckptfs_up{_labels(mount)} {0 if 'state' in mount else 1}"
    alive = [mount for mount in mounts if "state" not in mount]
    yield from _head("ckptfs_info", "gauge", "Always 1; what is mounted, and by which version.")
    for mount in alive:
        more = {key: mount[key] for key in ("version", "digest", "view", "verify")}
        yield f"ckptfs_info{_labels(mount, **more)} 1"
    for metric in _METRICS:
        yield from _head(metric.name, metric.kind, metric.help)
        for mount in alive:
            value: Any = mount
            for key in metric.path:
                value = value.get(key) if value is not None else None
            if value is None:
                continue  # ready_ms before the mount is ready, and of a layer store
            yield f"{metric.name}{_labels(mount)} {value / metric.divisor if metric.divisor > 1 else int(value)}"
    name = "ckptfs_read_wait_seconds"
    yield from _head(name, "summary", "How long reads waited for the network; quantiles are of the last 4096.")
    for mount in alive:
        reads = mount["reads"]
        for quantile, key in _QUANTILES:
            yield f"{name}{_labels(mount, quantile=quantile)} {reads[key] / 1000}"
        yield f"{name}_sum{_labels(mount)} {reads.get('waited_ms', 0) / 1000}"
        yield f"{name}_count{_labels(mount)} {reads.get('waits', 0)}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _labels(mount: dict[str, Any], **more: str) -> str:
    pairs = {"mountpoint": mount.get("mountpoint", ""), "reference": mount.get("reference", ""), **more}
    return "{" + ",".join(f'{key}="{_escaped(str(value))}"' for key, value in pairs.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

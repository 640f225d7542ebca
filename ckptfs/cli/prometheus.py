"""Status of mounts in Prometheus' text format (exposition format 0.0.4), for the node exporter's textfile collector."""

from collections.abc import Iterator, Sequence
from typing import Any

# name, kind, help, path of the field in a mount's status
_METRICS = (
    ("ckptfs_image_bytes", "gauge", "Compressed bytes of the layers of the view.", ("image_bytes",)),
    ("ckptfs_cached_bytes", "gauge", "How many of them this node has.", ("cached_bytes",)),
    ("ckptfs_complete", "gauge", "1 when all of them are here.", ("complete",)),
    ("ckptfs_ready_seconds", "gauge", "From the start of the command to the first possible read.", ("ready_ms",)),
    ("ckptfs_network_requests_total", "counter", "Requests sent.", ("network", "requests")),
    ("ckptfs_network_bytes_total", "counter", "Body bytes received.", ("network", "bytes")),
    ("ckptfs_network_retries_total", "counter", "Requests sent again.", ("network", "retries")),
    ("ckptfs_network_errors_total", "counter", "Requests given up.", ("network", "errors")),
    ("ckptfs_network_in_flight", "gauge", "Requests under way.", ("network", "in_flight")),
    ("ckptfs_reads_total", "counter", "Reads answered.", ("reads", "count")),
    ("ckptfs_read_bytes_total", "counter", "Bytes served.", ("reads", "bytes")),
    ("ckptfs_read_memory_hits_total", "counter", "Reads answered from memory.", ("reads", "memory_hits")),
    ("ckptfs_read_disk_hits_total", "counter", "Reads answered from the node's cache.", ("reads", "disk_hits")),
    ("ckptfs_read_misses_total", "counter", "Reads that waited for the network.", ("reads", "misses")),
    ("ckptfs_reads_waiting", "gauge", "Reads that wait for the network now.", ("reads", "waiting")),
    ("ckptfs_prefetched_bytes_total", "counter", "Bytes fetched before they were asked for.", ("prefetch", "bytes")),
    ("ckptfs_prefetched_used_bytes_total", "counter", "Of these, read later.", ("prefetch", "used_bytes")),
)


def exposition(mounts: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines for all mounts; a mount whose daemon is dead has only `ckptfs_up 0`."""
    yield "# HELP ckptfs_up Whether the daemon of the mount answers."
    yield "# TYPE ckptfs_up gauge"
    for mount in mounts:
        yield f"ckptfs_up{_labels(mount)} {0 if 'state' in mount else 1}"
    alive = [mount for mount in mounts if "state" not in mount]
    for name, kind, text, path in _METRICS:
        yield f"# HELP {name} {text}"
        yield f"# TYPE {name} {kind}"
        for mount in alive:
            value: Any = mount
            for key in path:
                value = value[key]
            yield f"{name}{_labels(mount)} {value / 1000 if path == ('ready_ms',) else int(value)}"


def _labels(mount: dict[str, Any]) -> str:
    pairs = (("mountpoint", mount.get("mountpoint", "")), ("reference", mount.get("reference", "")))
    return "{" + ",".join(f'{key}="{_escaped(str(value))}"' for key, value in pairs) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")

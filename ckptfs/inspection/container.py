"""The container as its engine wrote it down: config.dump, spec.dump, network.status, status.

Podman, CRI-O and containerd write different things under the same names; this module knows which fact stands where
(checkpointctl's rules, so that both tools say the same). Owns no CRIU image. Called by overview.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptfs.errors import FormatError
from ckptfs.inspection.source import CheckpointFiles, read_whole
from ckptfs.model.oci import parse_json
from ckptfs.settings import Limits

DUMPS = ("config.dump", "spec.dump", "network.status", "status", "status.dump", "pod.options", "stats-dump")

_FRACTION = re.compile(r"\.\d+")
_NEVER = "0001-01-01T00:00:00Z"  # Go's zero time
_ENGINES = {"libpod": "Podman", "cri-o": "CRI-O"}


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface of the container; addresses as the engine wrote them, Podman's with the length of the prefix."""

    network: str
    name: str
    addresses: tuple[str, ...]
    mac: str
    gateway: str


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of the runtime's specification."""

    destination: str
    type: str
    source: str


@dataclass(frozen=True, slots=True)
class Container:
    """What the engine says. Strings are "" and times None where it does not say; times are RFC 3339.

    `image` is the base image's name; `command` the process that the specification starts.
    """

    name: str = ""
    id: str = ""
    image: str = ""
    runtime: str = ""
    engine: str = ""
    created: str | None = None
    checkpointed: str | None = None
    pod: str = ""
    namespace: str = ""
    command: tuple[str, ...] = ()
    interfaces: tuple[Interface, ...] = ()
    mounts: tuple[Mount, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)


def read_container(files: CheckpointFiles, prefix: str, limits: Limits) -> Container:
    """The container whose dumps stand in the directory `prefix` ("" or "NAME/"). All may be missing."""
    config = _object(files, f"{prefix}config.dump", limits)
    spec = _object(files, f"{prefix}spec.dump", limits)
    annotations = {k: v for k, v in _mapping(spec.get("annotations")).items() if isinstance(v, str)}
    engine = _ENGINES.get(annotations.get("io.container.manager", ""), "containerd") if spec else ""
    name, created = _text(config.get("name")), _time(config.get("createdTime"))
    pod = namespace = ""
    interfaces: tuple[Interface, ...] = ()
    if engine == "CRI-O":
        metadata = annotations.get("io.kubernetes.cri-o.Metadata", "{}").encode()
        name = _text(_mapping(parse_json(metadata, "io.kubernetes.cri-o.Metadata")).get("name")) or name
        created = annotations.get("io.kubernetes.cri-o.Created") or created
        pod, namespace = (
            annotations.get("io.kubernetes.pod.name", ""),
            annotations.get("io.kubernetes.pod.namespace", ""),
        )
        if ip := annotations.get("io.kubernetes.cri-o.IP.0"):
            interfaces = (Interface("", "", (ip,), "", ""),)
    elif engine == "containerd":
        name = annotations.get("io.kubernetes.cri.container-name") or name
        pod = annotations.get("io.kubernetes.cri.sandbox-name", "")
        namespace = annotations.get("io.kubernetes.cri.sandbox-namespace", "")
    elif engine == "Podman":
        interfaces = tuple(_interfaces(_object(files, f"{prefix}network.status", limits)))
    return Container(
        name,
        _text(config.get("id")),
        _text(config.get("rootfsImageName")) or _text(config.get("rootfsImage")),
        _text(config.get("runtime")),
        engine,
        created,
        _time(config.get("checkpointedTime")),
        pod,
        namespace,
        tuple(_text(word) for word in _sequence(_mapping(spec.get("process")).get("args"))),
        interfaces,
        tuple(_mount(_mapping(mount)) for mount in _sequence(spec.get("mounts"))),
        annotations,
    )


def _mount(value: Mapping[str, Any]) -> Mount:
    return Mount(_text(value.get("destination")), _text(value.get("type")), _text(value.get("source")))


def _interfaces(status: Mapping[str, Any]) -> list[Interface]:
    out = []
    for network in sorted(status):
        found = _mapping(_mapping(status[network]).get("interfaces"))
        for name in sorted(found):
            interface = _mapping(found[name])
            subnets = [_mapping(subnet) for subnet in _sequence(interface.get("subnets"))]
            addresses = tuple(address for subnet in subnets if (address := _text(subnet.get("ipnet"))))
            gateways = [gateway for subnet in subnets if (gateway := _text(subnet.get("gateway")))]
            mac = _text(interface.get("mac_address"))
            out.append(Interface(network, name, addresses, mac, gateways[-1] if gateways else ""))
    return out


def _object(files: CheckpointFiles, path: str, limits: Limits) -> Mapping[str, Any]:
    """A JSON object, {} where the file is absent or null."""
    data = read_whole(files, path, limits.dump_bytes)
    if not data or not data.strip():
        return {}
    value = parse_json(data, path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormatError(f"{path} is not a JSON object")
    return value


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _sequence(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _time(value: object) -> str | None:
    """A time to the second, None for Go's zero."""
    text = _FRACTION.sub("", _text(value))
    return None if text in ("", _NEVER) else text

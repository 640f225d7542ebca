"""What a checkpoint says about itself, as the annotations that tools look for.

Three keys tell three engines that an image is a checkpoint (CRI-O's, podman's, checkpointctl's); checkpointctl's set
(lib/annotations.go, internal/oci_image_build.go) and podman's (libpod/define/annotations.go) say where it came from.
Reads config.dump and spec.dump, which are bounded and may lie. Called by push/__init__.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ckptfs
from ckptfs.errors import FormatError
from ckptfs.model.annotations import BASE_DIGEST, BASE_NAME, VERSION
from ckptfs.model.oci import Digest, parse_json
from ckptfs.push.checkpoint_files import Checkpoint
from ckptfs.settings import Limits

CRIU = "org.criu.checkpoint."
CRIO_NAME = "io.kubernetes.cri-o.annotations.checkpoint.name"
PODMAN = "io.podman.annotations.checkpoint."

_NAMES = (CRIU + "container.name", CRIO_NAME, PODMAN + "name")
_MANAGERS = {"libpod": "Podman", "cri-o": "CRI-O"}  # io.container.manager, as checkpointctl tells the engine


@dataclass(frozen=True, slots=True)
class Facts:
    """`name` of the container, `engine` "" for a checkpoint that no engine made, `base` its image's name."""

    name: str
    engine: str
    runtime: str
    base: str
    annotations: Mapping[str, str]


def read_facts(checkpoint: Checkpoint, name: str, limits: Limits) -> Facts:
    """`name` is what the container is called when no dump says it."""
    config = _dump(checkpoint, b"config.dump", limits)
    spec = _dump(checkpoint, b"spec.dump", limits)
    notes = spec.get("annotations")
    notes = notes if isinstance(notes, dict) else {}
    engine = _engine(checkpoint, config, notes)
    image_ref = _string(config, "rootfsImageRef")
    base = _string(config, "rootfsImageName") or _string(config, "rootfsImage")
    runtime = _string(config, "runtime")
    given = next((checkpoint.annotations[key] for key in _NAMES if checkpoint.annotations.get(key)), name)
    name = _string(config, "name") or given
    found = {
        CRIU + "engine.name": engine,
        CRIU + "container.name": name,
        CRIU + "rootfsImageUserRequested": _string(config, "rootfsImage"),
        CRIU + "rootfsImageName": _string(config, "rootfsImageName"),
        CRIU + "rootfsImageID": image_ref or _string(config, "rootfsImageID"),
        CRIU + "rawImageName": _raw_name(config),
        CRIU + "runtime.name": runtime,
        CRIO_NAME: name,
        PODMAN + "runtime.name": runtime,
        BASE_NAME: base if base != "scratch" else "",
        BASE_DIGEST: _digest_in(image_ref),
        VERSION: ckptfs.__version__,
    }
    found |= _pod(engine, notes)
    if engine == "Podman":
        found |= {
            PODMAN + "name": name,
            PODMAN + "rawImageName": _raw_name(config),
            PODMAN + "rootfsImageID": _string(config, "rootfsImageID"),
            PODMAN + "rootfsImageName": _string(config, "rootfsImageName"),
        }
    annotations = {key: value for key, value in found.items() if value} | dict(checkpoint.annotations)
    return Facts(annotations[CRIU + "container.name"], engine, runtime, annotations.get(BASE_NAME, ""), annotations)


def _engine(checkpoint: Checkpoint, config: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    manager = _string(notes, "io.container.manager")
    if manager in _MANAGERS:
        return _MANAGERS[manager]
    if "io.kubernetes.cri.container-type" in notes or checkpoint.find(b"status.dump") is not None:
        return "containerd"
    return "Podman" if "rootfsImageID" in config else ""


def _pod(engine: str, notes: Mapping[str, Any]) -> dict[str, str]:
    """Pod and namespace, in the annotations of the engine that made the checkpoint."""
    keys = {
        "containerd": ("io.kubernetes.cri.sandbox-name", "io.kubernetes.cri.sandbox-namespace"),
        "CRI-O": ("io.kubernetes.cri-o.KubeName", "io.kubernetes.cri-o.Namespace"),
    }.get(engine)
    if keys is None:
        return {}
    return {CRIU + "pod.name": _string(notes, keys[0]), CRIU + "pod.namespace": _string(notes, keys[1])}


def _dump(checkpoint: Checkpoint, path: bytes, limits: Limits) -> dict[str, Any]:
    """A dump at the root; {} where there is none, as for a plain directory of CRIU images."""
    file = checkpoint.find(path)
    if file is None or not file.is_regular:
        return {}
    value = parse_json(file.read(limits.dump_bytes), path.decode())
    if not isinstance(value, dict):
        raise FormatError(f"{path.decode()} is not a JSON object")
    return value


def _string(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key)
    return found if isinstance(found, str) else ""


def _raw_name(config: Mapping[str, Any]) -> str:
    return _string(config, "RawImageName") or _string(config, "rawImageName")  # podman 4 and 5


def _digest_in(reference: str) -> str:
    """The digest of NAME@DIGEST (containerd, CRI-O since 1.29); "" for an image ID."""
    _, at, digest = reference.rpartition("@")
    try:
        return str(Digest.parse(digest)) if at else ""
    except FormatError:
        return ""

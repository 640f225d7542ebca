"""What a checkpoint says of itself that a restore must know: its documents, its architecture, its root directory.

Reads through CheckpointFiles, so a mount, an unpacked directory and an image without a mount are the same.
"""

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from typing import Any

from ckptfs.criu.core import parse_core
from ckptfs.criu.files import parse_files
from ckptfs.criu.images import parse_name
from ckptfs.criu.inventory import parse_inventory
from ckptfs.criu.pagemap import PARENT, parse_pagemap
from ckptfs.criu.pstree import parse_pstree
from ckptfs.errors import FormatError
from ckptfs.inspection.source import CheckpointFiles, read_whole
from ckptfs.model.oci import machine_architecture, parse_json
from ckptfs.restore.checking import Finding, unprivileged_userfaultfd
from ckptfs.restore.runtimes import RUNTIMES, why_not
from ckptfs.settings import Limits, Settings

# criu runs one of these when it restores a container's network, even an empty one.
_LOCK_TOOLS = {"iptables": "iptables-restore", "nftables": "nft", "": ""}


def check_runtime(files: CheckpointFiles, wanted: str, settings: Settings, *, lazy: bool) -> Iterator[Finding]:
    """Whether a runtime here can restore the checkpoint. `wanted` may be auto: what wrote it, if that is known."""
    if files.size("spec.dump") is None:
        if wanted != "criu" and files.size("checkpoint/descriptors.json") is not None:  # runtimes write it
            detail = "the checkpoint is of a container, and has no spec.dump, which says how it is run"
            hint = "push it with its bundle's config.json as spec.dump, beside checkpoint/ (docs/pushing.md)"
            yield Finding("runtime", False, detail, hint, FormatError)
            return
        ok = wanted in ("auto", "criu")
        detail = "plain criu" if ok else f"the checkpoint has no spec.dump, which {wanted} needs"
        yield Finding("runtime", ok, detail, "restore it with --runtime criu", FormatError)
        return
    writer = writer_of(document(files, "config.dump", settings.limits) or {})
    if wanted == "criu":
        detail, hint = "the checkpoint is of a container, not of processes on a host", "leave --runtime out"
        yield Finding("runtime", False, detail, hint)
        return
    if wanted != "auto" and writer not in ("", wanted):
        # They hand different mounts to criu as external ones: "No mapping for N mountpoint".
        detail = f"the checkpoint was made with {writer}, and {wanted} cannot restore it"
        yield Finding("runtime", False, detail, f"leave --runtime out, or say {writer}")
        return
    names = candidates(writer, wanted)
    reasons = {name: why_not(name, settings) for name in names}
    usable = [name for name, reason in reasons.items() if not reason]
    detail = ", ".join(usable) if usable else "; ".join(reasons.values())
    yield Finding("runtime", bool(usable), detail, f"install {' or '.join(names)} built with criu")
    lock = _network_lock(files, settings.limits)
    ok = not lock or shutil.which(_LOCK_TOOLS[lock]) is not None
    detail = f"{_LOCK_TOOLS[lock]}, which criu needs for containers, is not in PATH" if not ok else lock or "not needed"
    yield Finding("network lock", ok, detail, f"install {lock}")
    if lazy and _has_user_namespace(document(files, "spec.dump", settings.limits) or {}):
        # The restored processes themselves call userfaultfd(2), and have no capability outside of their namespace.
        ok = unprivileged_userfaultfd()
        detail = "in user namespaces, too" if ok else "no lazy pages for containers with a user namespace"
        hint = "restore with --no-lazy-pages; or run: sysctl vm.unprivileged_userfaultfd=1"
        yield Finding("userfaultfd", ok, detail, hint)


def check_engine(files: CheckpointFiles, engine: str, settings: Settings, *, lazy: bool) -> Iterator[Finding]:
    """Whether an engine can restore the checkpoint from a stub: its runtime must hand a configuration file to criu."""
    needed = ("spec.dump", "config.dump") if engine == "podman" else ("spec.dump",)
    if lacking := [name for name in needed if files.size(name) is None]:
        detail = f"the checkpoint has no {lacking[0]}, without which {engine} cannot restore it"
        yield Finding("runtime", False, detail, "leave --engine out", FormatError)
        return
    if writer_of(document(files, "config.dump", settings.limits) or {}) == "crun":
        detail = "the checkpoint was made with crun, which engines cannot restore from a mount (crun 1.21)"
        hint = "leave --engine out: `ckptfs restore` uses crun itself, with lazy pages"
        yield Finding("runtime", False, detail, hint)
        return
    yield from check_runtime(files, "auto", settings, lazy=lazy)


def candidates(writer: str, wanted: str) -> tuple[str, ...]:
    """Runtimes that can be tried for a container; one restores only what it wrote itself, where that is known."""
    return (writer,) if writer else RUNTIMES if wanted == "auto" else (wanted,)


def writer_of(config: Mapping[str, Any]) -> str:
    """The runtime that made the checkpoint, by config.dump: runc, crun, or "" where it says something else."""
    name = os.path.basename(str(config.get("runtime", "")))
    return name if name in RUNTIMES else ""


def _has_user_namespace(spec: Mapping[str, Any]) -> bool:
    linux = spec.get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    return isinstance(namespaces, list) and any(isinstance(n, dict) and n.get("type") == "user" for n in namespaces)


def _network_lock(files: CheckpointFiles, limits: Limits) -> str:
    data = read_whole(files, "checkpoint/inventory.img", limits.criu_image_bytes)
    return parse_inventory(data, limits=limits).network_lock if data is not None else ""


def check_checkpoint(files: CheckpointFiles, settings: Settings) -> Iterator[Finding]:
    """Whether the image holds a checkpoint of one container or process tree, of this architecture."""
    if files.size("checkpoint/inventory.img") is None:
        pod = [name for name in files.list("") if files.size(f"{name}checkpoint/inventory.img") is not None]
        if pod:
            detail = f"the checkpoint is of a pod: {', '.join(name.rstrip('/') for name in pod)}"
            yield Finding("checkpoint", False, detail, "containers of pods cannot be restored one by one", FormatError)
            return
        hint = "`ckptfs ls REF` shows what it holds"
        yield Finding("checkpoint", False, "the image holds no checkpoint (no inventory.img)", hint, FormatError)
        return
    spec = files.size("spec.dump") is not None
    yield Finding("checkpoint", True, "a container" if spec else "processes without a container")
    theirs, ours = _architecture(files, settings), machine_architecture()
    detail = theirs if theirs == ours else f"the checkpoint is of a {theirs} machine, this one is {ours}"
    yield Finding("architecture", theirs == ours, detail, "restore it on a machine of its kind", FormatError)
    if lost := _lost_parent(files, settings.limits):
        detail = f"memory is in the checkpoint before, and the image has no {lost}"
        hint = "push the directory that has both, side by side (docs/pushing.md)"
        yield Finding("memory", False, detail, hint, FormatError)


def _lost_parent(files: CheckpointFiles, limits: Limits) -> str:
    """A checkpoint before, that pages were left to and that is not in the image; "" where there is none."""
    directory = "checkpoint"
    for _ in range(limits.pre_dumps):
        names = files.list(directory)
        parent = f"{directory}/parent"
        if "parent" not in names and "parent/" not in names:
            return ""
        if not files.list(parent):
            return parent if any(_leaves_pages(files, f"{directory}/{name}", limits) for name in names) else ""
        directory = parent
    return ""


def _leaves_pages(files: CheckpointFiles, path: str, limits: Limits) -> bool:
    name = path.rpartition("/")[2]
    kind = parse_name(name)
    if kind is None or kind.kind not in ("pagemap", "pagemap-shmem"):
        return False
    data = read_whole(files, path, limits.criu_image_bytes)
    return data is not None and any(run.flags & PARENT for run in parse_pagemap(data, name, limits).runs)


def document(files: CheckpointFiles, name: str, limits: Limits) -> dict[str, Any] | None:
    """A JSON object of the checkpoint; None where it has none."""
    raw = read_whole(files, name, limits.dump_bytes)
    if raw is None:
        return None
    value = parse_json(raw, name)
    if not isinstance(value, dict):
        raise FormatError(f"{name} is not a JSON object")
    return value


def root_mode(files: CheckpointFiles, limits: Limits) -> int | None:
    """The permissions that criu expects of the root directory, which no delta records; None if it does not say."""
    data = read_whole(files, "checkpoint/files.img", limits.criu_image_bytes)
    if data is None:
        return None
    for file in parse_files(data, limits=limits):
        if file.kind == "REG" and file.path in ("/", ".", "") and file.mode is not None and stat.S_ISDIR(file.mode):
            return stat.S_IMODE(file.mode)
    return None


def _architecture(files: CheckpointFiles, settings: Settings) -> str:
    """GOARCH of the machine that dumped, from the root task's registers; "unknown" for one we have no name for."""
    limits = settings.limits
    tree = read_whole(files, "checkpoint/pstree.img", limits.criu_image_bytes)
    if tree is None:
        raise FormatError("the checkpoint has no checkpoint/pstree.img", hint="it is not a complete CRIU checkpoint")
    name = f"core-{parse_pstree(tree, limits=limits)[0].pid}.img"
    core = read_whole(files, f"checkpoint/{name}", limits.criu_image_bytes)
    if core is None:
        raise FormatError(f"the checkpoint has no checkpoint/{name}", hint="it is not a complete CRIU checkpoint")
    return parse_core(core, name, limits).machine or "unknown"

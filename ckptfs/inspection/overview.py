"""The whole of a checkpoint: what `inspect` and `show` tell.

Puts container, processes and CRIU's own counts together, and names the images that nobody here can read. Announces all
metadata at once, then the pages with strings: two rounds behind a network. Called by the command line and image_diff.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ckptfs.criu.files import Socket
from ckptfs.criu.images import parse_name
from ckptfs.criu.inventory import DumpStatistics, Inventory, parse_dump_statistics, parse_inventory
from ckptfs.criu.namespaces import MountPoint, parse_mountpoints, parse_uts
from ckptfs.errors import FormatError
from ckptfs.inspection.container import DUMPS, Container, read_container
from ckptfs.inspection.parts import Part, image_kinds
from ckptfs.inspection.processes import Process, by_parent, read_processes
from ckptfs.inspection.source import CheckpointFiles, Images, Range, read_whole
from ckptfs.settings import Limits

T = TypeVar("T")

CHECKPOINT = "checkpoint"
_ROOTFS_DIFF = "rootfs-diff.tar"
_RUNTIME_FILES = {"descriptors.json", "parent"}  # in checkpoint/, but not of CRIU
_LOGS = (".log", ".txt")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes: of all files in checkpoint/, of the memory pages among them, of GPU memory, of rootfs-diff.tar."""

    total: int
    pages: int
    gpu_pages: int
    rootfs_diff: int


@dataclass(frozen=True, slots=True)
class Overview:
    """One checkpointed container. `inventory` is None in a checkpoint without CRIU images.

    `host_name` is that of the UTS namespace; `mount_points` are those of the mount namespace, where there was one of
    its own. `unknown` names files in checkpoint/ that no CRIU known here writes. What is not of `parts` is empty.
    """

    container: Container
    sizes: Sizes
    statistics: DumpStatistics | None
    inventory: Inventory | None
    processes: tuple[Process, ...]
    host_name: str
    mount_points: tuple[MountPoint, ...]
    unknown: tuple[str, ...]
    parts: Part = Part.EVERYTHING

    def to_json(self) -> dict[str, Any]:
        """checkpointctl's keys (`inspect --all --format json`), and more."""
        container = self.container
        out: dict[str, Any] = {"container_name": container.name, "image": container.image, "id": container.id}
        out.update(runtime=container.runtime, created=container.created or "", engine=container.engine)
        if container.checkpointed:
            out["checkpointed"] = container.checkpointed
        out.update(_network(container))
        out["checkpoint_size"] = {"total_size": self.sizes.total, "memory_pages_size": self.sizes.pages}
        if self.sizes.gpu_pages:
            out["checkpoint_size"]["amd_gpu_memory_pages_size"] = self.sizes.gpu_pages
        if self.sizes.rootfs_diff:
            out["checkpoint_size"]["root_fs_diff_size"] = self.sizes.rootfs_diff
        if self.statistics is not None:
            out["statistics"] = self.statistics._asdict()
        if Part.METADATA in self.parts:
            out["metadata"] = _labels(container)
        if self.processes:
            families = by_parent(self.processes)
            out["process_tree"] = _tree(families, families[0][0])
        if Part.FILES in self.parts:
            out["file_descriptors"] = [_descriptors(process) for process in self.processes if process.descriptors]
        if Part.SOCKETS in self.parts:
            out["sockets"] = [listed for process in self.processes if (listed := _sockets(process))]
        if Part.MOUNTS in self.parts:
            out["mounts"] = [
                {"destination": mount.destination, "type": mount.type, "source": mount.source}
                for mount in container.mounts
            ]
            out["mount_points"] = [point._asdict() for point in self.mount_points]
        if self.inventory is not None:
            out["criu"] = {**self.inventory._asdict(), "plugins": list(self.inventory.plugins)}
        out["host_name"] = self.host_name
        out["unknown_images"] = list(self.unknown)
        return out


def containers(files: CheckpointFiles) -> list[str]:
    """The prefixes of the containers in an image: "" for one at the root, "NAME/" for each of a pod's.

    FormatError where there is no checkpoint.
    """
    names = files.list("")
    if f"{CHECKPOINT}/" in names or "config.dump" in names or "inventory.img" in names:
        return [""]
    found = [name for name in names if name.endswith("/") and f"{CHECKPOINT}/" in files.list(name[:-1])]
    if not found:
        raise FormatError("there is no checkpoint", hint="expected a directory checkpoint/ or a file config.dump")
    return found


def summarise(files: CheckpointFiles, prefix: str = "", limits: Limits | None = None) -> tuple[Container, Sizes]:
    """What `show` prints of the container at `prefix` (of `containers`): no CRIU image is read."""
    limits = limits or Limits()
    images = open_images(files, prefix, limits)
    paths = [prefix + name for name in DUMPS]
    files.expect([(path, 0, size) for path in paths if (size := files.size(path)) and size <= limits.dump_bytes])
    return read_container(files, prefix, limits), _sizes(images, prefix)


def inspect(
    files: CheckpointFiles,
    prefix: str = "",
    limits: Limits | None = None,
    *,
    parts: Part = Part.EVERYTHING,
    pid: int | None = None,
) -> Overview:
    """The container at `prefix` (of `containers`); only what `parts` need is read.

    pid: only this process and its descendants. NotFoundError where there is none.
    """
    limits = limits or Limits()
    images = open_images(files, prefix, limits)
    files.expect(list(_metadata_ranges(images, prefix, parts)))
    inventory = images.read("inventory.img")
    asked = bool(parts & Part.OF_PROCESSES) and (pid is not None or "pstree.img" in images.names)
    points = _each(images, "mountpoints", parse_mountpoints) if Part.MOUNTS in parts else ()
    return Overview(
        read_container(files, prefix, limits),
        _sizes(images, prefix),
        _statistics(images, prefix) if Part.STATISTICS in parts else None,
        parse_inventory(inventory, limits=limits) if inventory is not None else None,
        read_processes(images, parts, pid) if asked else (),
        next(_each(images, "utsns", parse_uts), ("", ""))[0],
        tuple(point for found in points for point in found),
        tuple(name for name in images.names if _unknown(name)),
        parts,
    )


def open_images(files: CheckpointFiles, prefix: str = "", limits: Limits | None = None) -> Images:
    """The CRIU images of the container at `prefix`: in its checkpoint/, or right there in a bare images directory."""
    names = files.list(prefix.rstrip("/"))
    directory = prefix + CHECKPOINT if f"{CHECKPOINT}/" in names else prefix.rstrip("/")
    return Images(files, directory, limits or Limits())


def _metadata_ranges(images: Images, prefix: str, parts: Part) -> Iterable[Range]:
    """All files that `inspect` reads whole."""
    kinds = image_kinds(parts)
    paths = [prefix + name for name in DUMPS if name != "stats-dump" or Part.STATISTICS in parts]
    paths += [images.path(name) for name in images.names if (image := parse_name(name)) and image.kind in kinds]
    if parts & Part.OF_PROCESSES:
        paths += [path for path in images.inherited() if path.rpartition("/")[2].startswith("pagemap-")]
    for path in paths:
        size = images.files.size(path)
        if size is not None and size <= images.limits.criu_image_bytes:
            yield path, 0, size


def _sizes(images: Images, prefix: str) -> Sizes:
    total = pages = gpu = 0
    for name in images.names:
        size = images.files.size(images.path(name)) or 0
        total += size
        if name.startswith("pages-"):
            pages += size
        elif name.startswith("amdgpu-pages-"):
            gpu += size
    return Sizes(total, pages, gpu, images.files.size(prefix + _ROOTFS_DIFF) or 0)


def _statistics(images: Images, prefix: str) -> DumpStatistics | None:
    """The engines put stats-dump beside checkpoint/, criu itself into it."""
    for path in (f"{prefix}stats-dump", images.path("stats-dump")):
        if (data := read_whole(images.files, path, images.limits.criu_image_bytes)) is not None:
            return parse_dump_statistics(data, path, images.limits)
    return None


def _each(images: Images, kind: str, parse: Callable[[bytes, str, Limits], T]) -> Iterator[T]:
    """Every image of a kind, parsed."""
    for name in images.names:
        image = parse_name(name)
        if image is not None and image.kind == kind:
            yield parse(images.need(name), name, images.limits)


def _unknown(name: str) -> bool:
    return parse_name(name) is None and name not in _RUNTIME_FILES and not name.endswith(_LOGS)


def _network(container: Container) -> dict[str, Any]:
    addresses = [address.partition("/")[0] for interface in container.interfaces for address in interface.addresses]
    macs = [interface.mac for interface in container.interfaces if interface.mac]
    networks: dict[str, dict[str, Any]] = {}
    for interface in container.interfaces:
        if interface.network:
            network = networks.setdefault(interface.network, {"name": interface.network, "interfaces": {}})
            network["interfaces"][interface.name] = {
                "ip": interface.addresses[-1] if interface.addresses else "",
                "mac": interface.mac,
                "gateway": interface.gateway,
            }
    out: dict[str, Any] = {}
    if addresses:
        out["ip"] = ", ".join(addresses)
    if macs:
        out["mac"] = ", ".join(macs)
    if networks:
        out["networks"] = list(networks.values())
    return out


def _labels(container: Container) -> dict[str, Any]:
    out: dict[str, Any] = {}
    if container.pod:
        out["pod_name"] = container.pod
    if container.namespace:
        out["kubernetes_namespace"] = container.namespace
    out["annotations"] = dict(container.annotations)
    return out


def _tree(families: Mapping[int, Sequence[Process]], process: Process) -> dict[str, Any]:
    out = process.to_json()
    if nested := [_tree(families, child) for child in families.get(process.pid, ())]:
        out["children"] = nested
    return out


def _descriptors(process: Process) -> dict[str, Any]:
    return {
        "pid": process.pid,
        "open_files": [
            {"type": entry.kind, "fd": f"{entry.kind} {entry.fd}".strip(), "path": entry.path}
            for entry in process.descriptors
        ],
    }


def _sockets(process: Process) -> dict[str, Any] | None:
    found = [_socket(entry.fd, entry.socket) for entry in process.descriptors if entry.socket is not None]
    return {"pid": process.pid, "open_sockets": found} if found else None


def _socket(fd: str, socket: Socket) -> dict[str, Any]:
    data: dict[str, Any] = {"type": "UNIX" if socket.family == "UNIX" else socket.protocol, "state": socket.state}
    if socket.family == "UNIX":
        data["address"] = socket.source
    elif socket.family in ("INET", "INET6"):
        data.update(src=socket.source, src_port=socket.source_port)
        data.update(dst=socket.destination, dst_port=socket.destination_port)
    data.update(send_buf=socket.send_buffer, recv_buf=socket.receive_buffer)
    protocol = socket.type if socket.family == "UNIX" else socket.protocol
    return {"fd": fd, "family": socket.family, "protocol": protocol, "data": data}

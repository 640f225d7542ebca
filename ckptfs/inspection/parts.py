"""The parts that an overview can have, and which of CRIU's images each one is read from.

So that nothing is fetched for what nobody asked to see. Owns no reading.
"""

from enum import Flag, auto

from ckptfs.criu.files import LEGACY_IMAGES


class Part(Flag):
    """METADATA: annotations, pod and namespace. COMMANDS, ENVIRONMENT, FILES and SOCKETS are parts of PROCESSES."""

    PROCESSES = auto()
    COMMANDS = auto()
    ENVIRONMENT = auto()
    FILES = auto()
    SOCKETS = auto()
    MOUNTS = auto()
    STATISTICS = auto()
    METADATA = auto()

    OF_PROCESSES = PROCESSES | COMMANDS | ENVIRONMENT | FILES | SOCKETS
    EVERYTHING = OF_PROCESSES | MOUNTS | STATISTICS | METADATA


_IMAGES = {
    Part.OF_PROCESSES: {"pstree", "core", "mm", "vmas", "pagemap"},
    Part.FILES | Part.SOCKETS: {"ids", "fdinfo", "fs", "files", "memfd", *LEGACY_IMAGES},
    Part.MOUNTS: {"mountpoints"},
    Part.STATISTICS: {"stats-dump"},
}


def image_kinds(parts: Part) -> set[str]:
    """The kinds of images that have to be read for `parts`."""
    return {"inventory", "utsns"}.union(*(kinds for part, kinds in _IMAGES.items() if parts & part))

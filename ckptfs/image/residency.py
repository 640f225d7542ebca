"""How much of an image this node has: of all of it, of each layer, and of what the files are for.

Goes through every chunk of the image, 1 to 2 µs each, and keeps none, for 100 000 are 30 MB. An answer is given again
until that has cost less than a twentieth of the time. Fetches nothing, and does not read the cache. Called for status
and by `ckptfs cache`.
"""

import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ckptfs.image.opened import OpenImage
from ckptfs.model.node import Node
from ckptfs.model.toc import Inode, stored

_SHARE = 20  # at most one part in so many of the time is spent on answers
_DUMPS = (b"config.dump", b"spec.dump", b"network.status", b"stats-dump", b"dump.log", b"bind.mounts", b"deleted.files")
ROLES = ("metadata", "memory", "files")  # of a checkpoint: CRIU's images and the dumps; pages; file systems


class Part(NamedTuple):  # a dataclass would cost every mount half a millisecond more
    """Some of the image: `cached` of `size` bytes are here; None while that is not known."""

    name: str
    size: int
    cached: int | None


class Residency(NamedTuple):
    """cached_bytes  how many of `image.image_bytes` are here; all only when every chunk of every file is.

    layers  in the image's order, named by format and digest.
    roles   those of ROLES that the view has; () while not all names are known. Chunks that files of several roles share
            count for the first.
    """

    cached_bytes: int
    layers: tuple[Part, ...] = ()
    roles: tuple[Part, ...] = ()


class ResidencyMeter:
    """Of one image, to be asked again and again."""

    def __init__(self, image: OpenImage) -> None:
        self._image = image
        self._last: tuple[float, Residency] | None = None  # until when, what

    def measure(self, *, exact: bool = False) -> Residency:
        """As it is now, or, if it need not be `exact`, was a moment ago."""
        now = time.monotonic()
        if self._last is not None and now < self._last[0] and not exact:
            return self._last[1]
        began = time.thread_time()
        found = self._measured() if self._image.known else self._guessed()
        self._last = (now + _SHARE * (time.thread_time() - began), found)
        return found

    def _guessed(self) -> Residency:
        """While layers still say what is in them: no more than what has been received."""
        image = self._image
        layers = (Part(f"{layer.format} {d.digest}", d.size, None) for d, layer in image.layers.values())
        return Residency(min(image.counters.bytes, max(image.image_bytes - 1, 0)), tuple(layers))

    def _measured(self) -> Residency:
        image = self._image
        holds = image.fetcher.holds
        sizes: Counter[tuple[int, str]] = Counter()  # by layer and role
        here: Counter[tuple[int, str]] = Counter()
        for role, number, key, size in _chunks(image):
            sizes[number, role] += size
            if holds(key):
                here[number, role] += size
        layers = []
        for number, (descriptor, layer) in image.layers.items():
            total = sum(size for key, size in sizes.items() if key[0] == number)
            cached = sum(size for key, size in here.items() if key[0] == number)
            name = f"{layer.format} {descriptor.digest}"
            layers.append(Part(name, descriptor.size, _share(descriptor.size, cached, total)))
        cached = _share(image.image_bytes, sum(here.values()), sum(sizes.values()))
        keys = {role: [key for key in sizes if key[1] == role] for role in ROLES}
        roles = (Part(role, sum(sizes[key] for key in k), sum(here[key] for key in k)) for role, k in keys.items() if k)
        return Residency(cached, tuple(layers), tuple(roles))


def _share(size: int, cached: int, total: int) -> int:
    """Of streams only the decoded sizes are known, and headers between the chunks are counted with them."""
    return size if cached == total else min(size * cached // total, size - 1)


def _chunks(image: OpenImage) -> Iterator[tuple[str, int, bytes, int]]:
    """Role, layer, key and size of every chunk, each once."""
    seen: set[bytes] = set()
    files = _files(image.tree.root)
    for role in ROLES:
        for inode in files[role]:
            for key, layer, size in stored(inode.extents):
                if key not in seen:
                    seen.add(key)
                    yield role, layer, key, size


def _files(root: Node) -> dict[str, list[Inode]]:
    """Every inode that has a name, by what it is for."""
    found: dict[str, list[Inode]] = {role: [] for role in ROLES}
    directories = [root]
    while directories:
        directory = directories.pop()
        images = b"inventory.img" in directory.children
        for node in directory.children.values():
            if node.inode is not None and not node.children:
                found[_role(node.name, images=images, top=directory is root)].append(node.inode)
            directories.append(node)
    return found


def _role(name: bytes, *, images: bool, top: bool) -> str:
    """`images`: it lies in a directory of CRIU's; `top`: in the root."""
    if images:
        return "memory" if name.startswith(b"pages-") else "metadata"
    return "metadata" if top and name in _DUMPS else "files"

"""The layers of an image, each by itself: what an additional layer store shows of them to containers/storage.

A directory for each layer, named by its digest or by that of its table of contents:
diff/   the layer's tree as an overlay lower directory: whiteouts are character devices 0:0, opaque directories marked.
info    what containers/storage takes over as its own record of the layer (containers/storage layers.go: Layer).
blob    the layer as the registry has it.
An image that is opened with the view "layers" has an empty tree until `LayerDirectories` fills it. Nothing is fetched
of a layer but its table of contents, or the beginning of a stream. Used by layer_store.py
and fuse/store_operations.py.
"""

import json
import stat
import struct
from contextlib import suppress
from functools import partial
from typing import Any

import zstandard

from ckptfs.engine.threads import in_thread
from ckptfs.errors import CkptfsError, FormatError
from ckptfs.image.arrange import known_layers
from ckptfs.image.opened import OpenImage
from ckptfs.layers.media_types import Compression, compression_of
from ckptfs.layers.toc_layer import ANNOTATION_TOC_DIGEST
from ckptfs.layers.zstd_chunked import ANNOTATION_CHECKSUM as CHECKSUM
from ckptfs.model.blob import Blob
from ckptfs.model.node import Node
from ckptfs.model.oci import Descriptor, Digest, parse_diff_ids
from ckptfs.model.toc import Entry, Inode
from ckptfs.model.tree import Tree

DIFF, INFO, BLOB = b"diff", b"info", b"blob"

# containers/storage pkg/archive/archive.go: Compression
_COMPRESSION = {"none": 0, "gzip": 2, "zstd": 4}
# Whatever a layer says of its root, containers/storage leaves that out (drivers/overlay/overlay.go: defaultPerms;
# pkg/archive/archive.go: Unpack), and CRIU wants the mode that it has seen (files-reg.c: open_path).
ROOT_MODE = stat.S_IFDIR | 0o555
_GZIP_SIZE = struct.Struct("<I")  # RFC 1952: the last 4 bytes, the decoded size modulo 2^32
_ZSTD_HEADER = 18  # RFC 8878: a frame header has at most so many bytes
_TAR_BLOCK = 512


class LayerDirectories:
    """The directories of one open image. Runs in the event loop."""

    def __init__(self, image: OpenImage, *, by_toc: bool = False) -> None:
        """`by_toc`: directories are named by tables of contents, as containers/storage asks for since 1.54."""
        self._image = image
        self._by_toc = by_toc
        self._layers: dict[bytes, tuple[int, Blob, Digest]] = {}  # directory -> rank, layer, DiffID
        self._unopened: dict[Inode, Blob] = {}
        self._ours: set[Inode] = set()  # info and blob
        self._infos = 0  # added to a layer's rank: the rank of its info

    async def show(self) -> None:
        """Fill the image's tree. FormatError when the image's configuration does not describe its layers."""
        image, tree = self._image, self._image.tree
        layers = await known_layers(image)
        diff_ids = await in_thread(self._diff_ids)
        for rank, ((blob, known), diff_id) in enumerate(zip(layers, diff_ids, strict=True), start=1):
            digest = toc_digest(blob.descriptor) if self._by_toc else blob.descriptor.digest
            directory = str(digest).encode()
            if digest is None or directory in self._layers:
                continue  # the same layer twice: the same directory
            self._layers[directory] = rank, blob, diff_id
            tree.add([Entry(directory, Inode(stat.S_IFDIR | 0o755))], rank)
            tree.add([Entry(_in(directory, DIFF), Inode(ROOT_MODE))], rank)
            image.add_layer(blob, rank, prefix=_in(directory, DIFF), whiteouts="overlay", **known)
        self._infos = len(layers)
        for directory, (rank, blob, _) in self._layers.items():
            raw = Inode(stat.S_IFREG | 0o444, size=blob.size)
            self._unopened[raw] = blob
            self._ours.add(raw)
            tree.add([Entry(_in(directory, BLOB), raw)], self._infos + rank)
            tree.begin(self._infos + rank, _in(directory, INFO))
            image.dormant[_in(directory, INFO)] = partial(image.nursery.start_soon, self._tell, directory)

    def __contains__(self, directory: bytes) -> bool:
        return directory in self._layers

    def layer(self, node: Node) -> bytes | None:
        """The name of the layer if this is its directory."""
        return node.name if node.parent is self._image.tree.root else None

    async def readable(self, directory: bytes) -> None:
        """Until something of the layer has been read and made sense; raises what is wrong with it.

        An engine that learns of it now pulls the layer itself.
        """
        await self._described(directory)

    def prepare(self, inode: Inode) -> bool:
        """Before a file is opened; whether it is content of a layer.

        `blob` gets its bytes only here, or the background would fetch every layer twice.
        """
        blob = self._unopened.pop(inode, None)
        if blob is not None:
            inode.extents = self._image.raw_file(blob).extents
        return inode not in self._ours

    async def _described(self, directory: bytes) -> Node:
        image, node = self._image, self._image.tree.find(_in(directory, DIFF))
        assert node is not None
        while not image.tree.described(node):
            image.raise_broken((self._layers[directory][0],))
            await image.progress.wait()
        return node

    # -- info ----------------------------------------------------------------------------------------------------------

    async def _tell(self, directory: bytes) -> None:
        """Make up info, when somebody has looked for it."""
        image, (rank, blob, diff_id), path = self._image, self._layers[directory], _in(directory, INFO)
        failure: CkptfsError | None = None
        try:
            size = await self._decoded_size(await self._described(directory), blob)
            text = json.dumps(self._record(blob.descriptor, directory.decode(), diff_id, size)).encode() + b"\n"
            inode = image.fetcher.keep_file(text, Inode(stat.S_IFREG | 0o444, size=len(text)))
            self._ours.add(inode)
            image.tree.add([Entry(path, inode)], self._infos + rank)
        except CkptfsError as error:
            failure = error
        again = partial(image.nursery.start_soon, self._tell, directory)
        image.finish(image.tree, self._infos + rank, failure, again)

    async def _decoded_size(self, root: Node, blob: Blob) -> int:
        """Bytes of the layer's tar: exact where something tells, else what its files would take in a plain one.

        At least the layer's own size, for a stream that says nothing: engines refuse to push layers of unknown size.
        """
        claimed = compression_of(blob.descriptor.media_type) or "none"
        if claimed == "none":
            return blob.size
        if self._image.tree.complete(root.path):
            return _tar_size(self._image.tree, root.path)
        read = partial(_size_in_stream, blob, claimed)
        return await in_thread(read)

    def _record(self, descriptor: Descriptor, name: str, diff_id: Digest, size: int) -> dict[str, Any]:
        record: dict[str, Any] = {
            "compressed-size": descriptor.size,
            "diff-size": size,
            "compression": _COMPRESSION[compression_of(descriptor.media_type) or "none"],
        }
        if self._by_toc:
            # Layers known by their TOC must not claim the other digests: nobody has checked them (c/storage layers.go).
            return {**record, "toc-digest": name, "flags": {"expected-layer-diffid": str(diff_id)}}
        return {**record, "compressed-diff-digest": str(descriptor.digest), "diff-digest": str(diff_id)}

    def _diff_ids(self) -> list[Digest]:
        """Out of the image's configuration. Blocks."""
        resolved, key = self._image.resolved, f"config/{self._image.resolved.manifest.config.digest}"
        descriptor = resolved.manifest.config
        raw = self._image.cache.get_document(key)
        if raw is None or len(raw) != descriptor.size:
            raw = self._image.source.fetch(descriptor)
            self._image.cache.put_document(key, raw)
        descriptor.digest.check(raw, "the image's configuration")
        try:
            return parse_diff_ids(raw, resolved.manifest)
        except FormatError as error:
            error.hint = "an engine cannot store such an image; mount it with `ckptfs mount`"
            raise


def toc_digest(descriptor: Descriptor) -> Digest | None:
    """The name of the layer's table of contents to containers/storage (pkg/chunked/toc/toc.go); two names are none."""
    found = [descriptor.annotations[key] for key in (ANNOTATION_TOC_DIGEST, CHECKSUM) if key in descriptor.annotations]
    return Digest.parse(found[0]) if len(found) == 1 else None


def _in(directory: bytes, name: bytes) -> bytes:
    return directory + b"/" + name


def _tar_size(tree: Tree, top: bytes) -> int:
    """What the entries under `top` take in a tar without extended headers."""
    total, seen = 2 * _TAR_BLOCK, set[int]()
    for node in tree.walk(top):
        inode = node.inode
        if inode is None or (node.path == top and inode.mode == ROOT_MODE and not inode.mtime_ns):
            continue  # most layers say nothing of their root
        total += _TAR_BLOCK
        if inode.is_file and inode.ino not in seen:
            seen.add(inode.ino)
            total += -(-inode.size // _TAR_BLOCK) * _TAR_BLOCK
    return total


def _size_in_stream(blob: Blob, compression: Compression) -> int:
    """Blocks: one small request."""
    if compression == "gzip" and blob.size >= _GZIP_SIZE.size:
        (size,) = _GZIP_SIZE.unpack(blob.read_at(blob.size - _GZIP_SIZE.size, _GZIP_SIZE.size))
        while size + size // 1024 + 1024 < blob.size:  # gzip makes nothing larger by more than that
            size += 1 << 32
        return int(size)
    head = blob.read_at(0, min(_ZSTD_HEADER, blob.size))
    with suppress(zstandard.ZstdError):
        return max(zstandard.frame_content_size(head), blob.size)
    return blob.size

"""R, the container's root file system as an image: the base image's layers and the delta as one more layer.

podman and CRI-O write the delta as a plain tar of what was added or changed, and deleted.files, a list of what is gone;
that becomes a layer with whiteouts. containerd writes a gzip layer with whiteouts, which is taken bit for bit.
image-spec layer.md. A directory that was deleted and made again is opaque: what the base has there is gone.
"""

import hashlib
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import ckptfs
from ckptfs.errors import FormatError
from ckptfs.layers.compression import DECOMPRESS
from ckptfs.layers.zstd_chunked_writer import Member, write_layer
from ckptfs.model.annotations import BASE_DIGEST, BASE_NAME, DELTA_ROLE, ROLE, VERSION
from ckptfs.model.blob import MemoryBlob
from ckptfs.model.oci import Descriptor, Digest, Manifest, parse_json
from ckptfs.model.paths import deleted_paths, parents
from ckptfs.model.toc import Inode
from ckptfs.model.tree import OPAQUE, WHITEOUT, Tree
from ckptfs.push.checkpoint_files import Checkpoint, CheckpointFile
from ckptfs.push.image_files import LayerFiles
from ckptfs.push.manifest import CONFIG_TYPE, created, encode_manifest, to_json
from ckptfs.push.publisher import Publisher
from ckptfs.push.spool import Work, keep
from ckptfs.settings import MiB, Settings
from ckptfs.sources import Source

_DELTA = b"rootfs-diff.tar"
_DELETED = b"deleted.files"
_GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_TAR_LAYER = "application/vnd.oci.image.layer.v1.tar"
# Docker's names for the same bytes: an OCI manifest has OCI's.
_OCI_TYPES = {
    "application/vnd.docker.image.rootfs.diff.tar": _TAR_LAYER,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": _GZIP_LAYER,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}


@dataclass(frozen=True, slots=True)
class BaseImage:
    """The image that the container ran from. `name` as people know it."""

    source: Source
    manifest: Manifest
    name: str


class RootfsImage:
    """Builds R: `add_blobs` hands everything but the manifest to the publisher, `raw` is the manifest then."""

    def __init__(self, checkpoint: Checkpoint, base: BaseImage, work: Work, settings: Settings) -> None:
        self._checkpoint = checkpoint
        self._base = base
        self._work = work
        self._settings = settings
        self.raw = b""

    def add_blobs(self, publisher: Publisher, origin: str, threads: int) -> None:
        """`origin`: the base's repository, where it is of the target's registry. FormatError for a senseless base."""
        base = self._base
        config = parse_json(base.source.fetch(base.manifest.config), "base image's config")
        config = config if isinstance(config, dict) else {}
        rootfs = config.get("rootfs")
        diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        if not isinstance(rootfs, dict) or not isinstance(diff_ids, list) or len(diff_ids) != len(base.manifest.layers):
            raise FormatError(f"the config of the base image {base.name} does not fit its layers")
        layers = []
        for layer in base.manifest.layers:
            media_type = _OCI_TYPES.get(layer.media_type, layer.media_type)
            layers.append(Descriptor(media_type, layer.digest, layer.size, layer.annotations))
            publisher.add(layer, base.source.blob(layer), origin=origin)
        delta = self._delta(publisher, threads)
        if delta is not None:
            layer, diff_id = delta
            layers.append(layer)
            diff_ids.append(str(diff_id))
            config["rootfs"] = {**rootfs, "diff_ids": diff_ids}
            when = created(self._checkpoint)
            history = config.get("history")
            if isinstance(history, list):
                config["history"] = [*history, {"created": when, "created_by": "ckptfs push --rootfs"}]
            config["created"] = when
        raw = to_json(config)
        described = Descriptor(CONFIG_TYPE, Digest.of(raw), len(raw))
        publisher.add(described, MemoryBlob(described, raw))
        notes = {BASE_NAME: base.name, BASE_DIGEST: str(base.manifest.digest), VERSION: ckptfs.__version__}
        self.raw = encode_manifest(described, layers, notes)

    def _delta(self, publisher: Publisher, threads: int) -> tuple[Descriptor, Digest] | None:
        """The layer and its diff_id; None where the container changed nothing."""
        listed, limits = self._checkpoint.find(_DELETED), self._settings.limits
        deleted = deleted_paths(listed.read(limits.deleted_files_bytes), limits) if listed is not None else []
        file = self._checkpoint.find(_DELTA)
        spool = self._work.spool()
        if file is None or not file.is_regular or not file.inode.size:
            members: Iterable[Member] = self._layer([], deleted)
        else:
            compression = keep(file, spool)
            if compression == "gzip" and not deleted:  # containerd's, a layer as it is
                stream = DECOMPRESS["gzip"](spool.stream(0, spool.size), MiB, self._settings.limits)
                diff_id = _digest(stream)
                publisher.add(spool.descriptor, spool, done=spool.close)
                return spool.descriptor, diff_id
            opened = LayerFiles(
                [spool], self._work.directory, self._settings, whiteouts="plain"
            )  # they stay as they are
            files = self._work.enter(opened)
            members = self._layer(files.files(), deleted)
        members = list(members)
        if not members:
            return None
        out = self._work.spool()
        written = write_layer(members, out.write, annotations={ROLE: DELTA_ROLE}, threads=threads)
        out.complete(written.descriptor)
        publisher.add(written.descriptor, out, done=out.close)
        return written.descriptor, written.diff_id

    def _layer(self, added: list[CheckpointFile], deleted: list[bytes]) -> Iterator[Member]:
        """Added files, whiteouts, and the directories above both as the base has them, in the order of their paths."""
        members = {file.path: Member(file.path, file.inode, file.link, file.open) for file in added}
        directories = {file.path for file in added if file.inode.is_dir}
        directories.update(above for file in added for above in parents(file.path))
        files = members.keys() - directories
        for path in deleted:
            if path in files or not files.isdisjoint(parents(path)):
                continue  # the new file hides what was in its place
            parent, slash, name = path.rpartition(b"/")
            marker = path + b"/" + OPAQUE if path in directories else parent + slash + WHITEOUT + name
            members[marker] = Member(marker, Inode(stat.S_IFREG | 0o644))
        missing = {above for path in members for above in parents(path)} - members.keys()
        if missing:
            tree = self._base_tree()
            for path in missing:
                members[path] = Member(path, _directory(tree, path))
        return iter([members[path] for path in sorted(members)])

    def _base_tree(self) -> Tree:
        """A layer that has a file has the directories above it: without them an overlay shows them as root's, 0755."""
        blobs = [self._base.source.blob(layer) for layer in self._base.manifest.layers]
        with LayerFiles(blobs, self._work.directory, self._settings, names_only=True) as layers:
            return layers.tree


def _directory(tree: Tree, path: bytes) -> Inode:
    node = tree.find(path)
    if node is None or node.inode is None or not node.inode.is_dir:
        return Inode(stat.S_IFDIR | 0o755)
    return node.inode


def _digest(pieces: Iterator[bytes]) -> Digest:
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece)
    return Digest("sha256", hasher.hexdigest())

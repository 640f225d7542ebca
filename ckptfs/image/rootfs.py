"""`--view rootfs`: the container's whole root file system, the base image's layers with the delta on top.

The base is, in this order: what the user named; the root file system image that the checkpoint image names (one more
manifest in the same repository, the delta is already a layer of it); the base image that its annotations or config.dump
name, in whatever registry that is.
"""

import logging
import stat
from collections.abc import Sequence

from ckptfs.engine.threads import in_thread
from ckptfs.errors import CkptfsError, NotFoundError, UsageError
from ckptfs.image.delta import Unpacked
from ckptfs.image.opened import OpenImage
from ckptfs.image.resolve import Resolved, resolve_in_thread
from ckptfs.image.views import DELETED, DELTA
from ckptfs.layers import select_format
from ckptfs.layers.protocols import OtherFormat
from ckptfs.model.annotations import BASE_DIGEST, BASE_NAME, DELTA_ROLE, ROLE, ROOTFS_DIGEST
from ckptfs.model.oci import Descriptor, Digest, Reference, parse_json
from ckptfs.model.toc import Chunk, Inode
from ckptfs.model.tree import Tree
from ckptfs.settings import Settings
from ckptfs.sources import OpenSource, Source

log = logging.getLogger(__name__)


_NAMES = ("rootfsImageName", "rootfsImage", "RawImageName", "rawImageName", "rootfsImageRef")


async def show_rootfs(image: OpenImage, open_source: OpenSource | None, base: Reference | None) -> None:
    """Replace the checkpoint's tree, which must be arranged, by the tree of the root file system."""
    if open_source is None:
        raise UsageError("the root file system view needs to know how to reach the base image")
    whole = _root_image(image)
    if base is None and whole is not None:
        source, resolved = await _open(image, open_source, whole)
        delta = None
    else:
        base = base or await _base_of(image)
        source, resolved = await _open(image, open_source, base)
        node = await image.find_in_checkpoint(DELTA)
        # Engines write no tar where files were only deleted: as if it were empty
        delta = node.inode if node is not None and node.inode is not None else Inode(stat.S_IFREG)
    tree = image.show_new_tree()
    first = image.next_rank
    side = await image.find_side_documents(source, resolved.manifest)
    for rank, descriptor in enumerate(resolved.manifest.layers, start=first):
        image.add_layer(source.blob(descriptor), rank, side=side.get(descriptor.digest))
    if delta is not None:
        Unpacked(image, tree, b"", delta, "merge", DELETED).now()
    await image.ready()


async def base_directories(image: OpenImage, open_source: OpenSource | None, base: Reference | None) -> Tree | None:
    """Directories as the container had them, for a delta that only leads through them; None when nothing tells.

    The layer that `ckptfs push --rootfs` made of the delta has them; else the base image, if the user named it.
    """
    whole = _root_image(image)
    if open_source is None or (whole is None and base is None):
        return None
    try:
        if whole is not None:
            source, resolved = await _open(image, open_source, whole)
            layers = [layer for layer in resolved.manifest.layers if layer.annotations.get(ROLE) == DELTA_ROLE]
        elif base is not None:
            source, resolved = await _open(image, open_source, base)
            layers = list(resolved.manifest.layers)
        return await in_thread(_names, source, layers, image.options.settings)
    except CkptfsError as error:
        told = f"directories above the delta are shown as root's, 0755: {error}"
        log.warning("%s", told)
        image.errors.append(told)  # a daemon says nothing, and whoever named the base thinks that it counts
        return None


def _names(source: Source, layers: Sequence[Descriptor], settings: Settings) -> Tree:
    tree = Tree(limits=settings.limits)
    for rank, descriptor in enumerate(layers, start=1):
        tree.begin(rank)
        blob = source.blob(descriptor)
        try:
            tree.add(select_format(descriptor).open(blob, 0, settings).scan(_ignore), rank)
        except OtherFormat as found:
            tree.add(found.format.open(blob, 0, settings).scan(_ignore), rank)
        tree.finish(rank)
    return tree


def _ignore(chunk: Chunk, data: bytes) -> None:
    pass


def _root_image(image: OpenImage) -> Reference | None:
    """What `ckptfs push --rootfs` has put beside the checkpoint."""
    own, digest = image.source.reference, image.resolved.manifest.annotations.get(ROOTFS_DIGEST)
    if digest is None:
        return None
    return Reference(own.kind, own.host, own.repository, own.path, digest=Digest.parse(digest))


async def _open(image: OpenImage, open_source: OpenSource, reference: Reference) -> tuple[Source, Resolved]:
    source, options = open_source(reference), image.options
    try:
        return await resolve_in_thread(source, image.cache, options.settings.limits, offline=options.offline)
    except CkptfsError as error:
        error.hint = error.hint or "name the base image with --base REF"
        log.error("the base image %s cannot be opened", reference)
        raise


async def _base_of(image: OpenImage) -> Reference:
    """The base image by annotation or by config.dump; NotFoundError when neither names one that can be reached."""
    annotations = image.resolved.manifest.annotations
    names = [annotations.get(BASE_NAME, "")]
    digest = annotations.get(BASE_DIGEST, "")
    node = await image.find_in_checkpoint(b"config.dump")
    if node is not None and node.inode is not None and node.inode.size <= image.options.settings.limits.config_bytes:
        config = parse_json(await image.read(node.inode, 0, node.inode.size), "config.dump")
        if isinstance(config, dict):
            names += [config[key] for key in _NAMES if isinstance(config.get(key), str)]
    for name in names:
        try:
            reference = Reference.parse(name)
        except UsageError:
            continue  # an image ID, or a short name that only the engine can resolve
        if reference.kind == "registry" and reference.host != "localhost":  # podman's name for "made here"
            return reference.pinned(Digest.parse(digest)) if digest and reference.digest is None else reference
    told = ", ".join(dict.fromkeys(filter(None, names))) or "none"
    raise NotFoundError(f"no registry is known for the base image ({told})", hint="name it with --base REF")

"""What `--view checkpoint` shows, whatever tool made the image: checkpoint/, the dumps, and the delta as a directory.

Recognises the layouts that exist (docs: producers) by what stands in the merged root, and arranges the tree:
flat    podman, CRI-O, the kubelet's API: as it is; podman's pre-checkpoints too.
nested  containerd's `ctr checkpoint` unpacked into an image: index.json, oci-layout, blobs/; CRIU's files in a blob.
images  a directory of CRIU's images and nothing else, at the root or below (criu, runc, crun, docker, LXC).
pod     several containers, each a directory with a flat checkpoint in it.
None of these: no checkpoint; the tree stays raw.
"""

import json
import posixpath
import stat
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum

from ckptfs.criu.wire import Message
from ckptfs.errors import FormatError
from ckptfs.model.node import Node
from ckptfs.model.oci import Descriptor, parse_json
from ckptfs.model.parents import parent_images
from ckptfs.model.toc import Inode
from ckptfs.model.tree import Tree


class Layout(StrEnum):
    FLAT = "flat"
    NESTED = "nested"
    IMAGES = "images"
    POD = "pod"
    NONE = "none"


CRIU_TAR = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
CONTAINERD_CONFIG = "application/vnd.containerd.container.checkpoint.config.v1+proto"

# Tars that checkpoints are known to hold, each shown as a directory beside it as well.
DELTA, DELETED = b"rootfs-diff.tar", b"deleted.files"
_KNOWN_TARS = (DELTA, b"devshm-checkpoint.tar")


def recognise(tree: Tree, *, complete: bool) -> Layout | None:
    """The layout, as soon as it is certain; None while it is not. With `complete` always a layout."""
    names = tree.root.children
    if _is_container(tree.root):
        return Layout.FLAT
    if all(name in names for name in (b"index.json", b"oci-layout", b"blobs")):
        return Layout.NESTED
    if not complete:
        return None
    if any(_is_container(node) for node in tree.root.visible_children()):
        return Layout.POD
    return Layout.IMAGES if images_directory(tree) is not None else Layout.NONE


def images_directory(tree: Tree) -> bytes | None:
    """The path of the first directory that holds CRIU's inventory.img; the nearest to the root wins.

    Those that an increment takes for its parent come last: nobody restores from them while there is a later one.
    """
    found = [node.parent for node in tree.walk() if node.name == b"inventory.img" and node.parent is not None]
    parents = {parent_images(node) for node in found}
    paths = sorted((n.path for n in found), key=lambda path: (path in parents, path.count(b"/") + bool(path), path))
    return paths[0] if paths else None


def gathering(
    path: bytes, link: Callable[[bytes], bytes | None], exists: Callable[[bytes], bool]
) -> list[tuple[bytes, bytes]]:
    """The moves, (from, to), that show CRIU's images of `path` in checkpoint/, where other producers have them.

    What an increment's `parent` leads to comes along where the link would lead nowhere otherwise. `link`: the target of
    a directory's `parent`, None without one.
    """
    moves = [] if path == b"checkpoint" else [(path, b"checkpoint")]
    while moves and (to := link(path)):
        parent = posixpath.normpath(posixpath.join(path, to))
        target = posixpath.normpath(posixpath.join(moves[-1][1], to))
        inside = not path or parent == path or parent.startswith(path + b"/")  # it has moved with its child
        known = any(parent == source for source, _ in moves)
        if inside or known or not exists(parent) or exists(target) or b"/" in target or target in (b".", b".."):
            break
        moves.append((parent, target))
        path = parent
    return moves


def containers(tree: Tree) -> list[Node]:
    """The directories that hold a flat checkpoint: the root, or those of a pod's containers."""
    if _is_container(tree.root):
        return [tree.root]
    return sorted((n for n in tree.root.visible_children() if _is_container(n)), key=lambda node: node.name)


def inner_tars(tree: Tree, *, complete: bool) -> Iterator[tuple[bytes, Inode]]:
    """(path, inode) of the known tars of every container in the tree; a file of that name elsewhere is a file.

    Engines write no tar of a delta in which files are only deleted: with `complete` it is there, and empty.
    """
    for container in containers(tree):
        deleted = container.children.get(DELETED) if complete and DELTA not in container.children else None
        if deleted is not None and deleted.inode is not None and deleted.inode.is_file:
            head = container.path + b"/" if container.path else b""
            yield head + DELTA, Inode(stat.S_IFREG, mtime_ns=deleted.inode.mtime_ns)
        for name in _KNOWN_TARS:
            node = container.children.get(name)
            if node is not None and node.inode is not None and node.inode.is_file:
                yield node.path, node.inode
        volumes = container.children.get(b"volumes")
        if volumes is None or volumes.inode is None or not volumes.inode.is_dir:
            continue
        for node in list(volumes.visible_children()):
            directory = node.name.removesuffix(b".tar")
            if directory in (node.name, b"", b".", b".."):  # no tar, or one whose directory can have no name
                continue
            if node.inode is not None and node.inode.is_file:
                yield node.path, node.inode


def index_entries(raw: bytes) -> list[Descriptor]:
    """What an index inside an image names. FormatError when it is no index."""
    value = parse_json(raw, "index.json")
    manifests = value.get("manifests") if isinstance(value, dict) else None
    if not isinstance(manifests, list):
        raise FormatError("index.json has no list of manifests")
    return [Descriptor.from_json(m, f"index.json: manifests[{i}]") for i, m in enumerate(manifests)]


def is_checkpoint_index(entries: Iterable[Descriptor]) -> bool:
    """Whether they are the raw blobs of a checkpoint of containerd (core/images/mediatypes.go), and no manifests."""
    return any(entry.media_type == CRIU_TAR for entry in entries)


def spec_of(config: bytes) -> bytes:
    """The OCI runtime spec, JSON, out of containerd's config blob, protobuf Any{1: type_url, 2: value}; FormatError."""
    spec = Message(config, "containerd's config blob").raw(2, b"")
    try:
        json.loads(spec)
    except (ValueError, RecursionError):
        raise FormatError("containerd's config blob holds no JSON") from None
    return spec


def _is_container(node: Node) -> bool:
    if node.inode is None or not node.inode.is_dir:
        return False
    images = (node.children.get(name) for name in (b"checkpoint", b"pre-checkpoint"))
    return any(child is not None and child.inode is not None and child.inode.is_dir for child in images)

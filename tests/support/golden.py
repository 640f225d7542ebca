"""Golden listings: what an eager extraction of a layer gives, path by path.

`listing` makes one out of entries and a reader, `directory_listing` out of a folder; both look like the .golden.json
files under tests/data/corpus.
"""

import base64
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ckptfs.model.toc import Entry, Inode

_TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "dir",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFSOCK: "socket",
}
Listing = dict[str, Any]


def load(path: Path) -> Listing:
    return comparable(json.loads(path.read_bytes()))


def comparable(listing: Listing) -> Listing:
    groups = sorted(sorted(group) for group in listing["hardlinks"])
    return {"entries": listing["entries"], "hardlinks": groups}


def whole_seconds(found: Listing) -> Listing:
    """Without the fractions that golden files and most tools do not have."""
    entries = {path: {k: v for k, v in entry.items() if k != "mtime_ns"} for path, entry in found["entries"].items()}
    return {**found, "entries": entries}


def listing(entries: Iterable[Entry], read: Callable[[Inode], bytes], *, exact: bool = False) -> Listing:
    """The tree that entries make when each replaces what was there before, as an extraction does.

    `exact`: with nanoseconds, which golden files do not have.
    """
    tree: dict[bytes, Inode] = {}
    for entry in entries:
        if entry.inode is not None:
            tree[entry.path] = entry.inode
        else:
            assert entry.link is not None
            tree[entry.path] = tree[entry.link]
    names: dict[int, list[str]] = {}
    for path, inode in tree.items():
        names.setdefault(id(inode), []).append(os.fsdecode(path))
    found = {
        os.fsdecode(path): _describe(inode, len(names[id(inode)]), read, exact)
        for path, inode in tree.items()
        if path != b""
    }
    links = [group for group in names.values() if len(group) > 1 and found[group[0]]["type"] == "file"]
    return comparable({"entries": found, "hardlinks": links})


def _describe(inode: Inode, nlink: int, read: Callable[[Inode], bytes], exact: bool) -> dict[str, Any]:
    kind = stat.S_IFMT(inode.mode)
    mode = 0o777 if kind == stat.S_IFLNK else stat.S_IMODE(inode.mode)  # Linux knows no other for links
    seconds = int(inode.mtime_ns / 1_000_000_000)  # as golden listings were made: towards zero
    entry: dict[str, Any] = {
        "type": _TYPES[kind],
        "mode": f"{mode:04o}",
        "uid": inode.uid,
        "gid": inode.gid,
        "mtime": seconds,
    }
    if exact:
        entry["mtime_ns"] = inode.mtime_ns
    if kind != stat.S_IFDIR:
        entry |= {"size": inode.size, "nlink": nlink}
    if kind == stat.S_IFLNK:
        entry["link"] = os.fsdecode(inode.target)
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        entry["rdev"] = [os.major(inode.rdev), os.minor(inode.rdev)]
    if inode.xattrs:
        entry["xattrs"] = {os.fsdecode(k): base64.b64encode(v).decode() for k, v in sorted(inode.xattrs.items())}
    if kind == stat.S_IFREG:
        data = read(inode)
        assert len(data) == inode.size
        entry["sha256"] = hashlib.sha256(data).hexdigest()
    return entry


def directory_listing(root: Path) -> Listing:
    """The exact listing of what lies in a folder."""
    found: dict[str, Any] = {}
    groups: dict[int, list[str]] = {}
    for folder, directories, files in os.walk(root):
        for name in sorted(directories) + sorted(files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            relative = os.path.relpath(path, root)
            kind = stat.S_IFMT(status.st_mode)
            entry: dict[str, Any] = {
                "type": _TYPES[kind],
                "mode": f"{stat.S_IMODE(status.st_mode):04o}",
                "uid": status.st_uid,
                "gid": status.st_gid,
                "mtime": int(status.st_mtime),
                "mtime_ns": status.st_mtime_ns,
            }
            if kind != stat.S_IFDIR:
                entry |= {"size": status.st_size, "nlink": status.st_nlink}
            if kind == stat.S_IFLNK:
                entry["link"] = os.readlink(path)
            if kind in (stat.S_IFCHR, stat.S_IFBLK):
                entry["rdev"] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
            xattrs = {
                key: base64.b64encode(os.getxattr(path, key, follow_symlinks=False)).decode()
                for key in sorted(os.listxattr(path, follow_symlinks=False))
            }
            if xattrs:
                entry["xattrs"] = xattrs
            if kind == stat.S_IFREG:
                entry["sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
                if status.st_nlink > 1:
                    groups.setdefault(status.st_ino, []).append(relative)
            found[relative] = entry
    return comparable({"entries": found, "hardlinks": list(groups.values())})

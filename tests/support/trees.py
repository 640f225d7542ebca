"""A folder of everything that a tar can hold, and what the tools make of it."""

import hashlib
import itertools
import json
import os
import random
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptfs.model.oci import OCI_MANIFEST
from ckptfs.settings import KiB, MiB
from tests.support import golden
from tests.support.blobs import BytesBlob, blob_of
from tests.support.tools import run


def make_tree(root: Path, rng: random.Random, modest: bool) -> None:
    """Names, types, owners, times, xattrs, links and holes; the same for the same seed."""
    most, high = (1, 65_000) if modest else (9, 3_000_000)
    directories = [root]
    for depth in range(12):
        path = directories[-1 if depth < 6 else rng.randrange(len(directories))] / f"dir {depth} {'d' * (depth * most)}"
        path.mkdir()
        directories.append(path)
    files: list[Path] = []
    for index, length in enumerate(itertools.chain(range(1, 120, 7), (99, 100, 101, 155, 156, 200, 240, 255))):
        path = rng.choice(directories) / (f"{index:03}" + "n" * length)[:255]
        path.write_bytes(rng.randbytes(rng.choice((0, 1, 511, 512, 513, 5000, 300_000))))
        files.append(path)
    for name in ("ünïcode 漢字 🧊", "new\nline", "back\\slash", "tab\there", " space ", "-dash", "quote'\""):
        path = rng.choice(directories) / name
        path.write_bytes(name.encode())
        files.append(path)
    latin = os.path.join(os.fsencode(root), b"latin-\xe9\xff")
    Path(os.fsdecode(latin)).write_bytes(b"not UTF-8")
    for index in range(40):
        path = rng.choice(directories) / f"small-{index}"
        path.write_bytes(rng.randbytes(rng.randrange(40)))
        files.append(path)
    for index, target in enumerate(
        ("nowhere", "/etc/passwd", "../" * 30 + "x", "t" * 99, "t" * 100, "t" * 101, "t" * 900)
    ):
        (rng.choice(directories) / f"link-{index}").symlink_to(target)
    for index in range(6):
        os.link(rng.choice(files), rng.choice(directories) / f"hard-{index}{'h' * (index * 30)}")
    sparse = {
        "hole-front": [(1 * MiB, b"end")],
        "hole-back": [(0, b"begin"), (3 * MiB - 1, b"\0")],
        "all-hole": [],
        "many-holes": [(i * 16 * KiB, bytes((i + 1,)) * 4096) for i in range(60)],
    }
    for name, pieces in sparse.items():
        path = root / name
        with path.open("wb") as file:
            for offset, data in pieces:
                os.pwrite(file.fileno(), data, offset)
            file.truncate(3 * MiB)
        files.append(path)
    os.mkfifo(root / "fifo")
    os.mknod(root / "char", stat.S_IFCHR | 0o620, os.makedev(5, 259))
    os.mknod(root / "block", stat.S_IFBLK | 0o660, os.makedev(259, 70_000))
    os.mknod(root / ".wh.gone", stat.S_IFREG | 0o644)
    for index, path in enumerate(files):
        os.chown(path, rng.choice((0, 1000, 65534, high)), rng.choice((0, 5, high)))
        path.chmod(rng.choice((0o644, 0o4755, 0o2755, 0o1600, 0o000, 0o777)))
        if index % 5 == 0:
            os.setxattr(path, "user.note", rng.randbytes(index))
            os.setxattr(path, "user.emp=ty\n", b"")
    os.setxattr(root / "many-holes", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    times = (0, 1, *(() if modest else (-1, -86_400)), 1_000_000_000, 1_795_497_053, 4_000_000_000)
    for path in [*files, *reversed(directories[1:])]:
        nanoseconds = rng.choice(times) * 1_000_000_000 + rng.choice((0, 500_000_000, 123_456_789))
        os.utime(path, ns=(nanoseconds, nanoseconds))


def tar_listing(archive: Path, folder: Path) -> golden.Listing:
    """What GNU tar makes of an archive, extracted into a new folder."""
    folder.mkdir()
    run("tar", "-xpf", archive, "-C", folder, "--numeric-owner", "--xattrs", "--xattrs-include=*")
    return golden.directory_listing(folder)


def without_what_go_drops(listing: golden.Listing) -> golden.Listing:
    """containers/storage keeps no empty xattrs."""
    entries = {}
    for path, entry in listing["entries"].items():
        kept = {key: value for key, value in entry.get("xattrs", {}).items() if value}
        plain = {key: value for key, value in entry.items() if key != "xattrs"}
        entries[path] = plain | ({"xattrs": kept} if kept else {})
    return {**listing, "entries": entries}


def layout_of(tar: bytes, folder: Path) -> Path:
    """An OCI layout with one plain layer, tagged latest."""
    return layout_with(folder, [blob_of(tar)])


def layout_with(folder: Path, layers: Sequence[BytesBlob], annotations: Mapping[str, str] | None = None) -> Path:
    """An OCI layout of one image, tagged latest. The config's diff_ids are those of uncompressed layers only."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (blobs / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    for layer in layers:
        put(layer.data, layer.descriptor.media_type)
    config = {"architecture": "amd64", "os": "linux", "config": {}}
    config["rootfs"] = {"type": "layers", "diff_ids": [str(layer.descriptor.digest) for layer in layers]}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [layer.descriptor.to_json() for layer in layers],
        "annotations": dict(annotations or {}),
    }
    tagged = put(json.dumps(manifest).encode(), OCI_MANIFEST)
    tagged["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [tagged]}))
    (folder / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    return folder

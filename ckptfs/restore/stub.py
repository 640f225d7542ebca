"""The stub: a small checkpoint archive from which an unmodified engine restores while criu reads a mount.

Engines copy a checkpoint before they restore it, so the archive has everything but the memory: of checkpoint/ only the
two files that podman and runc look for. An annotation in spec.dump makes the runtime hand a configuration file to criu,
which is applied after the runtime's own options and says where the images really are. Owns the archive and that file.
Called by podman.py and by `ckptfs stub`.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ckptfs.errors import FormatError, RestoreError
from ckptfs.inspection.source import CheckpointFiles, read_whole
from ckptfs.model.oci import parse_json
from ckptfs.restore.bundle import CRIU_CONFIG
from ckptfs.restore.runtimes import write_criu_config
from ckptfs.settings import Limits, MiB

_IMAGES = ("inventory.img", "descriptors.json")
_LEFT_OUT = {"checkpoint", "pre-checkpoint", "dump.log", "ctr.log", "container.log", "stats-dump"}


class Redirection:
    """Files in `directory` that send criu elsewhere.

    `config` is what the annotation names, `work` has criu's logs and sockets.
    RestoreError for a directory that criu's configuration cannot hold.
    """

    def __init__(self, directory: Path) -> None:
        if any(char.isspace() for char in str(directory)):
            raise RestoreError(
                f"{directory} has a space, which criu's configuration cannot hold", hint="name another place"
            )
        self.config = directory / "criu.conf"
        self.work = directory / "work"
        self._directory = directory

    def write(self, images: Path, *, lazy: bool) -> None:
        """Send criu to the CRIU images in `images`, and no more to where an earlier redirection has sent it.

        criu does readlink() on images-dir when a runtime talks to it, so it must be a symlink.
        """
        link, new_link, new_config = (self._directory / name for name in ("images", ".images", ".criu.conf"))
        try:
            self.work.mkdir(exist_ok=True)
            write_criu_config(new_config, lazy=lazy, images_dir=link, work_dir=self.work)
            new_link.unlink(missing_ok=True)
            new_link.symlink_to(images)
            new_config.replace(self.config)
            new_link.replace(link)
        except OSError as error:
            raise RestoreError(
                f"{self._directory} cannot be written: {error.strerror}", hint="name another: stub --criu-dir"
            ) from None


def write_stub(files: CheckpointFiles, out: Path, config: Path, limits: Limits) -> int:
    """Write the new archive `out`; returns its size in bytes.

    FormatError when there is no container in the checkpoint. OSError when the archive cannot be written.
    It is for its owner alone: it has what only root could read. `config` is criu's configuration file, which the
    runtime hands to criu.
    """
    spec = _spec(files, config, limits)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(file, "wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        _add_directory(archive, "checkpoint")
        for name in _IMAGES:
            if (data := read_whole(files, f"checkpoint/{name}", limits.dump_bytes)) is not None:
                _add(archive, f"checkpoint/{name}", io.BytesIO(data), len(data))
        _add(archive, "spec.dump", io.BytesIO(spec), len(spec))
        for path in _outside(files, ""):
            if path.endswith("/"):
                _add_directory(archive, path.rstrip("/"))
            else:
                size = files.size(path) or 0
                _add(archive, path, _Reader(files, path, size), size)
    return out.stat().st_size


def _spec(files: CheckpointFiles, config: Path, limits: Limits) -> bytes:
    raw = read_whole(files, "spec.dump", limits.dump_bytes)
    if raw is None or files.size("config.dump") is None:
        raise FormatError(
            "the checkpoint has no spec.dump or config.dump, so no engine can restore it",
            hint="restore it with `ckptfs restore REF`",
        )
    spec = parse_json(raw, "spec.dump")
    if not isinstance(spec, dict) or not isinstance(spec.setdefault("annotations", {}), dict):
        raise FormatError("spec.dump is not an object with annotations")
    spec["annotations"][CRIU_CONFIG] = str(config)
    return json.dumps(spec).encode()


def _outside(files: CheckpointFiles, directory: str) -> Iterator[str]:
    """Files and directories but those of criu, logs, and the directories that a view shows beside their tars."""
    names = files.list(directory)
    for name in names:
        bare = name.rstrip("/")
        if (directory == "" and bare in _LEFT_OUT | {"spec.dump"}) or (name != bare and f"{bare}.tar" in names):
            continue
        path = f"{directory}{name}"
        if name != bare:
            yield path
            yield from _outside(files, path)
        elif files.size(path) is not None:
            yield path


def _add_directory(archive: tarfile.TarFile, path: str) -> None:
    member = tarfile.TarInfo(path)
    member.type, member.mode = tarfile.DIRTYPE, 0o700
    archive.addfile(member)


def _add(archive: tarfile.TarFile, path: str, content: io.RawIOBase | io.BytesIO, size: int) -> None:
    member = tarfile.TarInfo(path)
    member.size, member.mode = size, 0o600
    archive.addfile(member, content)


class _Reader(io.RawIOBase):
    """A file of the checkpoint as tarfile wants it."""

    def __init__(self, files: CheckpointFiles, path: str, size: int) -> None:
        self._files = files
        self._path = path
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self._size - self._at, MiB)
        buffer[:length] = self._files.read(self._path, self._at, length)
        self._at += length
        return length

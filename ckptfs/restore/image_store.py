"""Base images that are on this machine already: in the storage that podman, CRI-O and buildah share.

podman mounts them; nothing of the storage is read here but whether an image is there. Called by container.py, podman.py
and `ckptfs check`.
"""

import contextlib
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ckptfs.errors import NotFoundError, RestoreError
from ckptfs.settings import Settings

_STORAGE = Path("/var/lib/containers/storage")
_IDS = ("rootfsImageID", "rootfsImageRef")  # of podman; of CRI-O


def local_image(config: Mapping[str, Any]) -> str:
    """The id of the container's base image, if config.dump says it and we see the image here; else ""."""
    if shutil.which("podman") is None:
        return ""
    for key in _IDS:
        identity = config.get(key)
        if not isinstance(identity, str) or not identity.isalnum():
            continue
        with contextlib.suppress(OSError):  # root's storage is closed to others
            if any(_graph_root().glob(f"*-images/{identity}")):
                return identity
    return ""


def has_image(name: str, settings: Settings) -> bool:
    """Whether podman knows an image of that name or id."""
    if shutil.which("podman") is None:
        return False
    try:
        _podman(settings, "image", "exists", name)
    except NotFoundError:
        return False
    return True


@contextlib.contextmanager
def mounted_image(name: str, settings: Settings, *, keep: bool) -> Iterator[Path]:
    """An image of the storage as a directory, until the block ends unless `keep`. NotFoundError when there is none."""
    if shutil.which("podman") is None:
        raise RestoreError("podman is not in PATH, so local images cannot be mounted", hint="name --base REF")
    with ThreadPoolExecutor(1) as worker:  # what an interrupt does not wait for must still be undone
        mounting = worker.submit(_podman, settings, "image", "mount", name)
        try:
            yield Path(mounting.result())
        finally:
            if not keep and mounting.exception() is None:
                with contextlib.suppress(NotFoundError, RestoreError):
                    _podman(settings, "image", "unmount", name)


def _podman(settings: Settings, *words: str) -> str:
    try:
        done = subprocess.run(
            ["podman", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=settings.timeouts.tool,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise RestoreError(
            f"podman {' '.join(words)} has not ended after {error.timeout:g} s", hint="is its storage locked?"
        ) from None
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        raise NotFoundError(f"podman {' '.join(words)}: {said}", hint="`podman images` shows what is here")
    return done.stdout.strip()


def _graph_root() -> Path:
    """Where the storage is (containers-storage.conf(5))."""
    for file in ("/etc/containers/storage.conf", "/usr/share/containers/storage.conf"):
        with contextlib.suppress(OSError, ValueError):
            with open(file, "rb") as stream:
                storage = tomllib.load(stream).get("storage")
            if isinstance(storage, dict) and isinstance(root := storage.get("graphroot"), str):
                return Path(root)
    return _STORAGE

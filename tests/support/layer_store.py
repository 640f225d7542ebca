"""An additional layer store where podman is: `ckptfs store` in the namespace of an `Isolation`, and its storage.conf.

Owns the store's process and mount and, for each way to pull, a storage of podman's own. Called by tests of the store.
"""

import base64
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.isolation import Isolation
from tests.support.podman import Podman
from tests.support.tools import ROOT


class Configured:
    """An isolation whose tools find the storage that a storage.conf names."""

    def __init__(self, isolation: Isolation, configuration: Path) -> None:
        self._isolation = isolation
        self._environment = {"CONTAINERS_STORAGE_CONF": str(configuration), "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
        self.path = isolation.path
        self.forget_blobs = isolation.forget_blobs

    def run(self, *command: str | Path, **options: Any) -> Any:
        return self._isolation.run(*command, **{"env": {**os.environ, **self._environment}, **options})


def buildah(isolation: Isolation, *words: str) -> str:
    return isolation.run("buildah", "--storage-driver=vfs", *words).stdout.strip()


def commit(isolation: Isolation, base: str, name: str, change: Callable[[Path], None]) -> None:
    """Image `name`: one more layer, with what `change` makes of the root of `base`."""
    container = buildah(isolation, "from", base)
    try:
        change(isolation.path(buildah(isolation, "mount", container)))
        buildah(isolation, "umount", container)
        buildah(isolation, "commit", "--quiet", container, name)
    finally:
        buildah(isolation, "rm", container)


def storage(isolation: Isolation, folder: Path, name: str, *stores: Path, run: str = "") -> Podman:
    """podman with an empty storage of its own that knows these layer stores.

    `run`: its runroot; a container is restored only where its own was (podman 4.3: ConmonPidFile in config.dump).
    """
    run = run or f"/run/{name}"
    listed = ", ".join(f'"{store}:ref"' for store in stores)
    (folder / f"{name}.conf").write_text(
        f'[storage]\ndriver = "overlay"\nrunroot = "{run}"\ngraphroot = "/var/lib/containers/{name}"\n'
        f"[storage.options]\nadditionallayerstores = [{listed}]\n"
    )
    return Podman(Configured(isolation, folder / f"{name}.conf"), folder)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Store:
    """A running store. `path` is the same inside of the namespace and outside; `inside` leads there from here."""

    path: Path
    isolation: Isolation

    def ckptfs(self, *words: object, env: Mapping[str, str] | None = None) -> str:
        """What `ckptfs WORDS…` prints inside; RuntimeError with its words when it fails."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        command = [sys.executable, "-m", "ckptfs", *map(str, words)]
        return str(self.isolation.run(*command, env=environment).stdout)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.ckptfs("status", self.path, "--json"))
        return answer

    @property
    def fetched(self) -> int:
        return int(self.status()["network"]["bytes"])

    def directory(self, reference: str, digest: str = "") -> Path:
        """Where the image, or its layer, is; as this process can open it."""
        return self.isolation.path(self.path / base64.b64encode(reference.encode()).decode() / digest)


@contextmanager
def layer_store(isolation: Isolation, folder: Path, *options: object, name: str = "store") -> Iterator[Store]:
    """`ckptfs store` on folder/NAME with a cache beside it; ended afterwards whatever happens."""
    store = Store(folder / name, isolation)
    store.path.mkdir(exist_ok=True)
    store.ckptfs("store", store.path, "--cache-dir", folder / f"{name}-cache", *options)
    try:
        yield store
    finally:
        try:
            store.ckptfs("umount", "--force", store.path)
        except RuntimeError as error:
            if "nothing is mounted" not in str(error):
                raise

"""A user's own layer store for a user's own podman: in `podman unshare`, where owners are mapped as podman's are."""

import os
import shutil
from pathlib import Path

import pytest

from tests.support.images import ImageBuilder
from tests.support.isolation import Isolation
from tests.support.layer_store import commit
from tests.support.other_user import as_nobody
from tests.support.tools import require

pytestmark = [pytest.mark.restore, pytest.mark.registry, pytest.mark.fuse]

SCRIPT = """
set -e
mkdir -p $HOME/store $HOME/.config/containers
cat > $HOME/.config/containers/storage.conf <<END
[storage]
driver = "overlay"
[storage.options]
additionallayerstores = ["$HOME/store:ref"]
END
trap 'podman unshare ckptfs umount --force $HOME/store; podman system migrate' EXIT
podman unshare ckptfs store --no-background-fetch $HOME/store
podman pull --quiet --tls-verify=false REF >&2
podman unshare ckptfs status $HOME/store
podman unshare sh -c '
  root=$(podman image mount REF)
  stat -c "%u:%g %a" $root/owned $root/deep/new
  cat $root/deep/new
  for name in anew deep; do echo $name $(ls $root/$name); done
  podman image umount REF >&2'
podman rmi --force REF >&2
podman unshare ckptfs status $HOME/store
"""


def test_in_podmans_namespace(isolation: Isolation, image_builder: ImageBuilder) -> None:
    require("podman", "newuidmap", "setpriv", root=True)

    def first(root: Path) -> None:
        for name in ("deep/old", "anew/old", "owned"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).write_text(f"{name}\n")
        os.chown(root / "owned", 1000, 2000)
        (root / "large").write_bytes(os.urandom(4 << 20))

    def second(root: Path) -> None:
        (root / "deep/new").write_text("new\n")
        (root / "deep/new").chmod(0o640)
        shutil.rmtree(root / "anew")
        (root / "anew").mkdir()
        (root / "anew/fresh").write_text("fresh\n")

    commit(isolation, "scratch", "rootless-1", first)
    commit(isolation, "rootless-1", "rootless-2", second)
    reference = image_builder.push("rootless-2", "rootless", "zstd:chunked")
    done = as_nobody("sh", "-c", SCRIPT.replace("REF", reference), fuse=True, subordinate=True)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines()]
    for users in (2, 0):
        assert f"image    {reference} (2 layers, 4.0 MiB, {users} users)" in lines
    fetched = next(line for line in lines if line.startswith("network"))
    assert fetched.split()[2] == "KiB" and float(fetched.split()[1]) < 100
    shown = lines[lines.index("1000:2000 644") : lines.index(f"image    {reference} (2 layers, 4.0 MiB, 0 users)") - 1]
    assert shown == ["1000:2000 644", "0:0 640", "new", "anew fresh", "deep new old"]

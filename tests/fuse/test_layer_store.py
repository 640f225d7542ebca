"""`ckptfs store` by itself: the paths that containers/storage looks up, what they answer, and what is in the way."""

import base64
import errno
import gzip
import json
import os
import signal
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ckptfs.layers.toc_layer import ANNOTATION_TOC_DIGEST
from ckptfs.layers.zstd_chunked import ANNOTATION_CHECKSUM
from ckptfs.model.oci import Digest
from tests.support.chunked import chunked_layer
from tests.support.command import Mounted, ckptfs
from tests.support.fake_registry import FakeRegistry, Flip, Status
from tests.support.hanging import ended, errno_of
from tests.support.other_user import NOBODY, let_in
from tests.support.stargz import estargz_of
from tests.support.tars import member
from tests.support.tools import require, wait_for

pytestmark = pytest.mark.fuse

TAR = "application/vnd.oci.image.layer.v1.tar"
PLAIN = member(b"plain", b"plain\n") + bytes(1024)
BIG = os.urandom(3 << 20)


@contextmanager
def store_on(folder: Path, *options: object, name: str = "store") -> Iterator[Mounted]:
    """A store on folder/NAME; ended whatever happens. Stores in one folder share a cache."""
    path = folder / name
    with suppress(OSError):  # it is there, dead perhaps
        path.mkdir()
    begun = ckptfs("store", path, "--json", "--cache-dir", folder / "cache", "--no-background-fetch", *options)
    assert begun.code == 0, begun.err
    try:
        yield Mounted(path, begun.json, folder / "cache")
    finally:
        ended = ckptfs("umount", "--force", path)
        assert ended.code == 0 or "nothing is mounted" in ended.err, ended.err


def add(registry: FakeRegistry, name: str, *layers: tuple[str, bytes, dict[str, str]]) -> list[Digest]:
    """An image whose configuration lists its layers; their digests."""
    config = {"rootfs": {"type": "layers", "diff_ids": [str(Digest.of(b"%d" % n)) for n in range(len(layers))]}}
    registry.add_image(
        "repo",
        name,
        [(kind, data) for kind, data, _ in layers],
        config=json.dumps(config).encode(),
        layer_annotations=[notes for _, _, notes in layers],
    )
    return [Digest.of(data) for _, data, _ in layers]


def place(store: Mounted, reference: str, digest: object = "") -> Path:
    return store.path / base64.b64encode(reference.encode()).decode() / str(digest)


@contextmanager
def fails(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, caught.value


def use(layer: Path) -> None:
    """As containers/storage does it: notifyUseAdditionalLayer."""
    with fails(errno.ENOENT):
        os.close(os.open(layer / "use", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))


def release(layer: Path) -> None:
    """notifyReleaseAdditionalLayer."""
    with fails(errno.ENOENT):
        os.rmdir(layer)


def users(store: Mounted) -> list[int]:
    return [image["users"] for image in store.status()["images"]]


def test_what_a_layer_shows(tmp_path: Path) -> None:
    """Each by itself: whiteouts as overlayfs has them, the bytes of the registry, what containers/storage records."""
    upper = b"".join(
        member(name, data)
        for name, data in (
            (b"deleted/.wh.one", b""),
            (b".wh.gone", b""),
            (b"gone/.wh.below", b""),
            (b"anew/.wh..wh..opq", b""),
            (b"anew/two", b"two\n"),
        )
    ) + bytes(1024)
    packed = gzip.compress(upper)
    chunked = chunked_layer({b"dir/file": b"file\n", b"big": BIG}, 65536)
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        plain, gz, zst = add(registry, "1", (TAR, PLAIN, {}), (TAR + "+gzip", packed, {}), chunked)
        reference = registry.reference("repo:1")
        assert sorted(os.listdir(place(store, reference, gz))) == ["blob", "diff", "info"]
        found = [json.loads((place(store, reference, digest) / "info").read_text()) for digest in (plain, gz, zst)]
        assert [f["compression"] for f in found] == [0, 2, 4]
        assert [f["compressed-diff-digest"] for f in found] == [str(plain), str(gz), str(zst)]
        assert [f["compressed-size"] for f in found] == [len(PLAIN), len(packed), len(chunked[1])]
        assert [f["diff-digest"] for f in found] == [str(Digest.of(b"%d" % n)) for n in range(3)]
        assert [f["diff-size"] for f in found][:2] == [len(PLAIN), len(upper)]
        assert len(BIG) < found[2]["diff-size"] < len(BIG) + 8192
        assert store.status()["network"]["bytes"] < 100_000
        layer = place(store, reference, gz) / "diff"
        assert layer.stat().st_mode == stat.S_IFDIR | 0o555
        for whiteout in ("deleted/one", "gone"):
            status = (layer / whiteout).lstat()
            assert stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
        for name in ("trusted.overlay.opaque", "user.overlay.opaque"):
            assert os.getxattr(layer / "anew", name) == b"y"
            with fails(errno.ENODATA):
                os.getxattr(layer / "deleted", name)
        assert (layer / "anew/two").read_text() == "two\n" and not (layer / "plain").exists()
        for digest, data in ((plain, PLAIN), (gz, packed), (zst, chunked[1])):
            assert (place(store, reference, digest) / "blob").read_bytes() == data
        assert (place(store, reference, zst) / "diff/big").read_bytes() == BIG
        assert sorted(os.listdir(place(store, reference))) == sorted(map(str, (plain, gz, zst)))
        assert os.listdir(store.path) == [place(store, reference).name]
        for folder in (store.path, place(store, reference), place(store, reference, gz), layer, layer / "anew"):
            listed = subprocess.run(["ls", "-a", folder], capture_output=True, text=True, check=True).stdout.split()
            assert {".", ".."} <= set(listed) and len(listed) == len(os.listdir(folder)) + 2


def test_newer_engines_ask_by_table_of_contents(tmp_path: Path) -> None:
    """containers/storage since 1.54: that digest names the layer, and no digest that nobody has checked is claimed."""
    stargz = estargz_of(PLAIN, 4096)
    chunked = chunked_layer({b"file": b"file\n"}, 65536)
    both = {**chunked[2], ANNOTATION_TOC_DIGEST: str(Digest.of(b"another"))}
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        layers = add(
            registry, "1", chunked, (stargz.descriptor.media_type, stargz.data, dict(stargz.descriptor.annotations))
        )
        reference = registry.reference("repo:1")
        tables = (chunked[2][ANNOTATION_CHECKSUM], stargz.descriptor.annotations[ANNOTATION_TOC_DIGEST])
        for number, (toc, name) in enumerate(zip(tables, ("file", "plain"), strict=True)):
            info = json.loads((place(store, reference, toc) / "info").read_text())
            assert info["toc-digest"] == toc
            assert info["flags"] == {"expected-layer-diffid": str(Digest.of(b"%d" % number))}
            assert not {"diff-digest", "compressed-diff-digest"} & set(info)
            assert (place(store, reference, toc) / "diff" / name).exists()
            assert (place(store, reference, layers[number]) / "diff" / name).exists()
        add(registry, "2", (*chunked[:2], both))
        for toc in (both[ANNOTATION_CHECKSUM], both[ANNOTATION_TOC_DIGEST]):
            with fails(errno.ENOENT):
                os.stat(place(store, registry.reference("repo:2"), toc))


def test_only_what_is_absent_is_absent(tmp_path: Path) -> None:
    """ENOENT without a request for what is no reference or digest, after one for another layer; EIO for all else."""
    layout = base64.b64encode(f"oci:{tmp_path}".encode()).decode()
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        (digest,) = add(registry, "1", (TAR, PLAIN, {}))
        reference = registry.reference("repo:1")
        for name in (
            "nothing",
            "bm8gcmVmZXJlbmNl",
            "%%%",
            layout,
            str(digest),
            "x" * 255,
            base64.b64encode(b"\xff").decode(),
        ):
            with fails(errno.ENOENT):
                os.stat(store.path / name)
        for name in ("diff", "sha256:12", "sha256:" + "G" * 64, "use"):
            with fails(errno.ENOENT):
                os.stat(place(store, reference, name))
        assert not registry.log
        other = Digest.of(b"another layer")
        with fails(errno.ENOENT):
            os.stat(place(store, reference, other))
        assert len(registry.log) == 1
        with fails(errno.ENOENT):
            os.stat(place(store, reference, digest) / "another")
        for missing in ("repo:2", "none:1"):
            with fails(errno.EIO):
                os.stat(place(store, registry.reference(missing), digest))
        assert "repo:2" not in json.dumps(store.status()["images"])
        assert any("tag '2'" in error for error in store.status()["errors"])
        # it is pushed now: what was said of it is not said for long
        (later,) = add(registry, "2", (TAR, PLAIN + bytes(512), {}))
        wait_for("the image", lambda: (place(store, registry.reference("repo:2"), later) / "diff/plain").exists)
        wait_for("the layer", lambda: _exists(place(store, registry.reference("repo:2"), later) / "diff/plain"))


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def test_an_image_whose_configuration_is_no_list_of_layers(tmp_path: Path) -> None:
    """An artifact, say: containers/storage could not store it."""
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        registry.add_image("repo", "1", [(TAR, PLAIN)])
        with fails(errno.EIO):
            os.stat(place(store, registry.reference("repo:1"), Digest.of(PLAIN)))
        assert "does not list its layers" in store.status()["errors"][0]


@pytest.mark.alone
def test_a_registry_that_is_away_and_comes_back(tmp_path: Path) -> None:
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        (digest,) = add(registry, "1", chunked_layer({b"file": b"file\n"}, 65536))
        layer = place(store, registry.reference("repo:1"), digest)
        registry.script = {("manifests/", None): Status(403)}
        with fails(errno.EACCES):
            os.stat(layer)
        asked = len(registry.log)
        with fails(errno.EACCES):
            os.stat(layer)
        assert len(registry.log) == asked  # an engine looks for one layer after another
        registry.script = {}
        wait_for("the layer", lambda: _exists(layer / "diff/file"))
        # what was opened stays, whatever becomes of the registry
        registry.script = {("GET", None): Status(500)}
        assert (layer / "info").exists()


def test_a_damaged_layer_is_known_before_it_is_taken(tmp_path: Path) -> None:
    """EIO for its diff, so that the engine pulls by itself; the others are served, and it is tried again."""
    good, away, bad = (chunked_layer({name: b"file\n"}, 65536) for name in (b"file", b"other", b"third"))
    bad = (*bad[:2], {**bad[2], ANNOTATION_CHECKSUM: str(Digest.of(b"another table"))})
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        digests = add(registry, "1", good, away, bad)
        reference = registry.reference("repo:1")
        registry.script = {(f"blobs/{digests[1]}", None): Status(404)}
        assert (place(store, reference, digests[0]) / "diff/file").read_text() == "file\n"
        for digest in digests[1:]:
            with fails(errno.EIO):
                os.stat(place(store, reference, digest) / "diff")
        assert (place(store, reference, digests[0]) / "diff/file").read_text() == "file\n"
        registry.script = {}
        wait_for("the layer", lambda: _exists(place(store, reference, digests[1]) / "diff/other"))
        with fails(errno.EIO):
            os.stat(place(store, reference, digests[2]) / "diff")


def test_wrong_bytes_reach_nobody(tmp_path: Path) -> None:
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        (digest,) = add(registry, "1", chunked_layer({b"big": BIG}, 65536))
        big = place(store, registry.reference("repo:1"), digest) / "diff/big"
        assert big.stat().st_size == len(BIG)
        registry.script = {(f"blobs/{digest}", None): Flip()}
        with fails(errno.EIO):
            big.read_bytes()


def test_users_are_counted_and_nothing_is_written(tmp_path: Path) -> None:
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        first, second = add(registry, "1", (TAR, PLAIN, {}), chunked_layer({b"file": b"file\n"}, 65536))
        reference = registry.reference("repo:1")
        layer = place(store, reference, first)
        for path in (layer, layer, place(store, reference, second)):
            use(path)
        assert users(store) == [3]
        release(layer)
        assert users(store) == [2] and (layer / "diff/plain").read_text() == "plain\n"
        for path in (layer, layer, place(store, reference, second), place(store, reference, second)):
            release(path)
        assert users(store) in ([], [0])
        release(layer)  # one too many
        for change in (
            lambda: os.mkdir(store.path / "new"),
            lambda: os.mkdir(layer / "new"),
            lambda: os.rmdir(place(store, reference)),
            lambda: os.rmdir(layer / "diff"),
            lambda: os.unlink(layer / "info"),
            lambda: os.unlink(layer / "diff/plain"),
            lambda: os.rename(layer / "info", layer / "other"),
            lambda: os.symlink("x", layer / "link"),
            lambda: os.link(layer / "info", layer / "hard"),
            lambda: os.chmod(layer / "diff/plain", 0),
            lambda: os.chown(layer / "diff", 1, 1),
            lambda: os.truncate(layer / "blob", 0),
            lambda: os.setxattr(layer / "diff/plain", "user.x", b""),
            lambda: os.mknod(layer / "fifo", 0o010644),
            lambda: (layer / "new").write_text(""),
            lambda: (layer / "diff/new").write_text(""),
            lambda: (layer / "info").write_text(""),
            lambda: (store.path / "use").write_text(""),
        ):
            with fails(errno.EROFS):
                change()


def test_two_stores_of_one_cache(tmp_path: Path) -> None:
    """What one has fetched the other has; users are each store's own."""
    with FakeRegistry() as registry, store_on(tmp_path) as one, store_on(tmp_path, name="two") as two:
        (digest,) = add(registry, "1", chunked_layer({b"big": BIG}, 65536))
        reference = registry.reference("repo:1")
        use(place(one, reference, digest))
        assert (place(one, reference, digest) / "diff/big").read_bytes() == BIG
        assert (place(two, reference, digest) / "diff/big").read_bytes() == BIG
        assert two.status()["network"]["bytes"] < 20_000
        assert (users(one), users(two)) == ([1], [0])
        assert ckptfs("umount", one.path).code == 0
        assert (place(two, reference, digest) / "info").exists()


def test_a_killed_store_is_mended_and_knows_its_users(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        (digest,) = add(registry, "1", chunked_layer({b"file": b"file\n"}, 65536))
        reference = registry.reference("repo:1")
        with store_on(tmp_path) as store:
            use(place(store, reference, digest))
            os.kill(store.pid, signal.SIGKILL)
            # All its threads have ended when the kernel says so; whether it has been reaped is another matter.
            wait_for("the end", lambda: errno_of(lambda: os.stat(place(store, reference, digest))) == errno.ENOTCONN)
            wait_for("the end", lambda: ended(store.pid))
            add(registry, "1", (TAR, PLAIN, {}))  # the tag moves
            registry.log.clear()
            with store_on(tmp_path) as again:
                assert (place(again, reference, digest) / "diff/file").read_text() == "file\n"
                assert users(again) == [1]
                assert not registry.requests("manifests/1")
                release(place(again, reference, digest))
            with store_on(tmp_path) as again, fails(errno.ENOENT):
                os.stat(place(again, reference, digest))


def test_a_store_below_an_overlay_stays(tmp_path: Path) -> None:
    """`ckptfs umount` says who is in the way; with --force the containers get errors, and nothing hangs."""
    require(root=True)  # mounts an overlay
    storage = tmp_path / "overlay"
    for name in ("l", "top/upper", "top/work", "top/merged", "lower"):
        (storage / name).mkdir(parents=True)
    with FakeRegistry() as registry, store_on(tmp_path) as store:
        (digest,) = add(registry, "1", chunked_layer({b"file": b"file\n", b"other": b"other\n"}, 65536))
        (storage / "lower/diff").symlink_to(place(store, registry.reference("repo:1"), digest) / "diff")
        (storage / "l/SHORT").symlink_to("../lower/diff")
        merged = storage / "top/merged"
        where = f"lowerdir={storage}/l/SHORT,upperdir={storage}/top/upper,workdir={storage}/top/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", where, merged], check=True)
        try:
            (merged / "file").write_text("changed\n")
            refused = ckptfs("umount", store.path)
            assert refused.code == 8 and f"below 1 overlay mounts, the first on {merged}" in refused.line
            assert (merged / "other").read_text() == "other\n"
            assert ckptfs("umount", "--force", store.path).code == 0
            assert not os.path.ismount(store.path)
            with pytest.raises(OSError):
                (merged / "another").stat()
        finally:
            subprocess.run(["umount", merged], check=True)


def test_others_stay_outside(tmp_path: Path) -> None:
    """Without --allow-other: whoever can look up names uses the credentials of whoever runs the store."""
    require("setpriv", root=True)
    let_in(tmp_path)
    with FakeRegistry() as registry:
        add(registry, "1", (TAR, PLAIN, {}))
        name = place(Mounted(Path(), {}, Path()), registry.reference("repo:1"), Digest.of(PLAIN))
        nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
        for options, code in (((), 1), (("--allow-other",), 0)):
            with store_on(tmp_path, *options) as store:
                command = [*nobody, "cat", store.path / name / "diff/plain"]
                shown = subprocess.run(command, capture_output=True, check=False)
                assert shown.returncode == code, shown.stderr


def test_strict_and_offline(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        digests = add(registry, "1", chunked_layer({b"file": b"file\n"}, 65536))
        streamed = add(registry, "2", (TAR + "+gzip", gzip.compress(PLAIN), {}))
        with store_on(tmp_path, "--verify", "strict") as store:
            assert (place(store, registry.reference("repo:1"), digests[0]) / "diff/file").read_text() == "file\n"
            with fails(errno.EIO):
                os.stat(place(store, registry.reference("repo:2"), streamed[0]))
        registry.log.clear()
        with store_on(tmp_path, "--offline") as store:
            assert (place(store, registry.reference("repo:1"), digests[0]) / "diff/file").read_text() == "file\n"
            with fails(errno.EIO):
                os.stat(place(store, registry.reference("repo:3"), digests[0]))
        assert not registry.log


def test_the_rest_is_fetched_once_something_is_read(tmp_path: Path) -> None:
    with FakeRegistry() as registry, store_on(tmp_path, "--background-fetch") as store:
        (digest,) = add(registry, "1", chunked_layer({b"a": b"a", b"big": BIG}, 65536))
        layer = place(store, registry.reference("repo:1"), digest)
        assert (layer / "info").read_text() and (layer / "diff/big").stat().st_size == len(BIG)

        def fetched() -> int:
            return int(store.status()["network"]["bytes"])

        subprocess.run(["sleep", "1.5"], check=True)  # longer than a background waits
        assert fetched() < 100_000
        assert (layer / "diff/a").read_text() == "a"
        wait_for("the rest", lambda: fetched() > len(BIG) // 2)


def test_status_and_metrics(tmp_path: Path) -> None:
    with FakeRegistry() as registry, store_on(tmp_path, "--metrics", "0") as store:
        (digest,) = add(registry, "1", (TAR, PLAIN, {}))
        reference = registry.reference("repo:1")
        use(place(store, reference, digest))
        assert (place(store, reference, digest) / "diff/plain").read_text() == "plain\n"
        told: Any = store.status()
        assert told["complete"] and told["images"][0]["cached_bytes"] == len(PLAIN)
        with urllib.request.urlopen(f"http://{told['metrics']}/metrics", timeout=10) as answer:
            assert "ckptfs_image_bytes{" in answer.read().decode()
        watch = [sys.executable, "-m", "ckptfs", "status", store.path, "--watch", "--interval", "0.1"]
        with subprocess.Popen(watch, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watching:
            assert watching.stdout is not None and watching.stderr is not None
            line = watching.stdout.readline()
            watching.send_signal(signal.SIGINT)
            assert b"2.0 KiB of 2.0 KiB" in line and watching.stderr.read() == b""
        assert told["reference"] == "layer-store" and told["images"][0]["reference"] == reference
        assert f"image    {reference} (1 layers, 2.0 KiB, 1 users)" in ckptfs("status", store.path).out
        assert "ckptfs_network_requests_total{" in ckptfs("status", "--prometheus").out
        mounts = [mount["mountpoint"] for mount in ckptfs("status", "--json").json]
        assert str(store.path) in mounts
        again = ckptfs("store", store.path, "--cache-dir", store.cache)
        assert again.code == 8 and "is mounted already" in again.line

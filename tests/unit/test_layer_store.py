"""The images behind a layer store: opened once, remembered by layer, closed when nobody knows them."""

import base64
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio
import trio.testing

from ckptfs.engine.cache import ChunkCache
from ckptfs.image import ImageOptions
from ckptfs.image.layer_store import LayerStore, digest_of, name_of, reference_of
from ckptfs.model.oci import Digest, Reference
from ckptfs.sources import Source
from ckptfs.sources.layout import LayoutSource
from ckptfs.telemetry import NetworkCounters
from tests.support.blobs import blob_of
from tests.support.tars import member
from tests.support.trees import layout_with

TAR = member(b"file", b"file\n") + bytes(1024)
OTHER = member(b"other", b"other\n") + bytes(1024)
REFERENCE = Reference.parse("registry.example/app:1")


def run(folder: Path, work: Callable[[LayerStore], Awaitable[None]], *, name: str = "store") -> list[Reference]:
    """`work` with a store whose registry is folder/layout; returns what images were reached."""
    reached: list[Reference] = []

    def reach(reference: Reference) -> Source:
        reached.append(reference)
        tag = "" if reference.digest else ":latest"
        pinned = f"@{reference.digest}" if reference.digest else ""
        return LayoutSource(Reference.parse(f"oci:{folder}/layout{tag}{pinned}"))

    async def main() -> None:
        options = ImageOptions(view="layers", prefetch=False, background=False)
        with ChunkCache.open(folder / "cache") as cache:
            async with trio.open_nursery() as nursery:
                await work(LayerStore(name, reach, cache, options, NetworkCounters(), nursery, background=False))
                nursery.cancel_scope.cancel()

    trio.run(main)
    return reached


def test_names() -> None:
    for text in ("registry.example/app:1", "127.0.0.1:5000/a/b-c__d:T.1", f"h.example/x@{Digest.of(b'x')}"):
        reference = Reference.parse(text)
        assert reference_of(name_of(reference)) == reference and b"/" not in name_of(reference)
    for bad in (b"", b"...", b"\xff", base64.b64encode(b"oci:/etc"), base64.b64encode(b"archive:/etc/x.tar"), b"YQ="):
        assert reference_of(bad) is None
    assert digest_of(str(Digest.of(b"x")).encode()) == Digest.of(b"x")
    assert digest_of(b"sha256:xyz") is None and digest_of(b"\xff") is None


def test_an_image_is_opened_once_and_closed_when_nobody_knows_it(tmp_path: Path) -> None:
    layout_with(tmp_path / "layout", [blob_of(TAR), blob_of(OTHER)])

    async def work(store: LayerStore) -> None:
        first = await store.find(REFERENCE, Digest.of(TAR))
        assert first is not None and await store.find(REFERENCE, Digest.of(OTHER)) is first
        assert await store.find(REFERENCE, Digest.of(b"no layer")) is None
        assert store.images() == [first] == store.images(REFERENCE) and store.image(first.slot) is first
        known = True
        first.held = lambda: known
        store.close_unused(idle=0)
        assert store.images() == [first]
        known = False
        store.close_unused(idle=60)
        assert store.images() == [first]
        store.close_unused(idle=0)
        assert store.images() == []
        await trio.testing.wait_all_tasks_blocked(0.1)
        assert store.image(first.slot) is None
        again = await store.find(REFERENCE, Digest.of(TAR))
        assert again is not None and again.slot > first.slot  # numbers are never used twice

    reached = run(tmp_path, work)
    assert reached.count(REFERENCE) == 3  # the image, the layer that it has not, the image again


def test_users_are_remembered_for_each_store(tmp_path: Path) -> None:
    layout_with(tmp_path / "layout", [blob_of(TAR)])

    async def pulls(store: LayerStore) -> None:
        assert await store.find(REFERENCE, Digest.of(TAR)) is not None
        for _ in range(2):
            await store.use(REFERENCE, Digest.of(TAR))
        await store.use(REFERENCE, Digest.of(b"no layer"))
        await store.release(REFERENCE, Digest.of(b"no layer"))
        assert store.users(REFERENCE) == 2

    async def goes_on(store: LayerStore) -> None:
        assert await store.find(REFERENCE, Digest.of(TAR)) is not None
        assert store.users(REFERENCE) == 2
        for _ in range(3):
            await store.release(REFERENCE, Digest.of(TAR))
        assert store.users(REFERENCE) == 0

    async def other(store: LayerStore) -> None:
        assert await store.find(REFERENCE, Digest.of(TAR)) is not None
        assert store.users(REFERENCE) == 0

    assert run(tmp_path, pulls)[0] == REFERENCE
    assert run(tmp_path, other, name="another")[0] == REFERENCE
    assert all(reference.digest is not None for reference in run(tmp_path, goes_on))
    assert run(tmp_path, other)[0] == REFERENCE


def test_what_was_remembered_and_makes_no_sense_is_nothing(tmp_path: Path) -> None:
    layout_with(tmp_path / "layout", [blob_of(TAR)])
    digest = str(Digest.of(TAR))
    for number, raw in enumerate(
        (b"", b"[]", b"{", json.dumps({digest: ["sha256:1", 1]}).encode(), json.dumps({digest: 7}).encode())
    ):
        name = f"store-{number}"
        with ChunkCache.open(tmp_path / "cache") as cache:
            cache.put_document(f"layer-store/{name}/{REFERENCE}", raw)

        async def work(store: LayerStore) -> None:
            assert await store.find(REFERENCE, Digest.of(TAR)) is not None
            assert store.users(REFERENCE) == 0

        run(tmp_path, work, name=name)

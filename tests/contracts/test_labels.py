"""Row M11: what is said of who vouches for the bytes is true in every format, before and after a layer came whole."""

import gzip
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio
import zstandard

from ckptfs.engine.cache import ChunkCache
from ckptfs.errors import IntegrityError
from ckptfs.image import OpenImage
from ckptfs.settings import KiB
from tests.support.blobs import TAR, BytesBlob, blob_of
from tests.support.chunked import chunked_layer, read_file, with_image
from tests.support.command import ckptfs, mounted
from tests.support.each import each
from tests.support.fake_registry import FakeRegistry, Flip
from tests.support.faulty import BLOB, Record
from tests.support.sources import client
from tests.support.stargz import estargz_of
from tests.support.tars import END, member
from tests.support.tools import require

FILE = b"file"
DATA = Random(41).randbytes(700_000)
PLAIN = member(FILE, DATA) + member(b"small", b"x") + END


def _stargz_without_digest() -> BytesBlob:
    blob = estargz_of(PLAIN, 64 * KiB)
    return replace(blob, descriptor=blob.descriptor._replace(annotations={}))


def _chunked() -> BytesBlob:
    media_type, data, notes = chunked_layer({FILE: DATA, b"small": b"x"}, 64 * KiB)
    return blob_of(data, media_type, notes)


def _chunked_without_digest() -> BytesBlob:
    return blob_of(_chunked().data, TAR + "+zstd")


# format -> (the layer, whether each chunk has a digest that the manifest vouches for)
LAYERS: dict[str, tuple[Callable[[], BytesBlob], bool]] = {
    "tar": (lambda: blob_of(PLAIN), False),
    "gzip": (lambda: blob_of(gzip.compress(PLAIN), TAR + "+gzip"), False),
    "zstd": (lambda: blob_of(zstandard.compress(PLAIN), TAR + "+zstd"), False),
    "eStargz": (lambda: estargz_of(PLAIN, 64 * KiB), True),
    "eStargz without a digest": (_stargz_without_digest, False),
    "zstd:chunked": (_chunked, True),
    "zstd:chunked without a digest": (_chunked_without_digest, False),
}


def add(registry: FakeRegistry, kind: str) -> bool:
    make, chunks = LAYERS[kind]
    blob = make()
    notes = [blob.descriptor.annotations]
    registry.add_image("repo", "latest", [(blob.descriptor.media_type, blob.data)], layer_annotations=notes)
    return chunks


@pytest.mark.row("M11")
@pytest.mark.parametrize("kind", LAYERS)
def test_the_label_of_an_image(kind: str, tmp_path: Path, record_property: Record) -> None:
    async def at_once(image: OpenImage) -> tuple[str, bool]:
        return image.verification, image.counters.bytes >= image.image_bytes

    async def in_the_end(image: OpenImage) -> str:
        assert await read_file(image, FILE) == DATA
        for _ in range(2000):
            if image.verification == "chunk":
                break
            await trio.sleep(0.01)
        return image.verification

    with FakeRegistry() as registry, client(registry) as c:
        chunks = add(registry, kind)
        first, whole = with_image(c, tmp_path / "lazy", at_once)
        assert first == "chunk" if chunks else first == "transport" or whole, "a small stream may have come whole"
        last = with_image(c, tmp_path / "whole", in_the_end, background=True)
        assert last == "chunk"
    record_property("figure", f"{kind}: {first}, then {last}")


@pytest.mark.row("M11")
@pytest.mark.parametrize("kind", LAYERS)
def test_what_has_been_vouched_for_is_so_when_it_is_fetched_again(kind: str, tmp_path: Path) -> None:
    async def work(image: OpenImage) -> None:
        assert await read_file(image, FILE) == DATA
        with trio.fail_after(20):
            while image.verification != "chunk":  # noqa: ASYNC110
                await trio.sleep(0.01)
        registry.script[BLOB, None] = Flip(8 * 300_000)
        image.cache.clear(force=True)
        image.fetcher.memory.clear()
        with suppress(IntegrityError):  # of bytes that others than the file's chunks are in the way of
            assert await read_file(image, FILE) == DATA

    with FakeRegistry() as registry, client(registry) as c:
        add(registry, kind)
        with_image(c, tmp_path, work, background=True)


@pytest.mark.row("M11")
@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_stream_of_which_only_the_names_are_known(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its index was larger than the cache's share for documents; nobody has hashed what comes now."""
    put = ChunkCache.put_document

    def left_out(self: ChunkCache, name: str, data: bytes) -> None:
        if not name.startswith("index/"):
            put(self, name, data)

    async def whole(image: OpenImage) -> str:
        assert await read_file(image, FILE) == DATA
        await image.all_known()
        assert image.fetcher.cache.flush(5)
        image.cache._log.prune(0, live=True)
        return image.verification

    async def again(image: OpenImage) -> tuple[str, bool]:
        return image.verification, image.known

    async def read_again(image: OpenImage) -> str:
        assert await read_file(image, FILE) == DATA
        assert await read_file(image, b"small") == b"x"
        with trio.fail_after(20):
            while image.verification != "chunk":  # noqa: ASYNC110
                await trio.sleep(0.01)
        return image.verification

    monkeypatch.setattr(ChunkCache, "put_document", left_out)
    with FakeRegistry() as registry, client(registry) as c:
        add(registry, kind)
        assert with_image(c, tmp_path, whole, background=True) == "chunk"
        assert with_image(c, tmp_path, again) == ("transport", True)
        assert with_image(c, tmp_path, read_again) == "chunk"


@pytest.mark.row("M11")
@pytest.mark.parametrize("kind", LAYERS)
def test_strict_refuses_what_is_not_verified_chunk_by_chunk(kind: str, tmp_path: Path) -> None:
    async def work(image: OpenImage) -> bytes:
        return await read_file(image, FILE)

    with FakeRegistry() as registry, client(registry) as c:
        if add(registry, kind):
            assert with_image(c, tmp_path, work, strict=True) == DATA
        else:
            with pytest.raises(IntegrityError, match="cannot be verified chunk by chunk"):
                with_image(c, tmp_path, work, strict=True)


@pytest.mark.fuse
@pytest.mark.row("M11")
def test_what_a_user_sees_of_it(tmp_path: Path) -> None:
    require("fusermount3")
    with FakeRegistry() as registry:
        add(registry, "zstd:chunked")
        with mounted(registry.reference("repo:latest"), tmp_path, "--view", "raw", "--verify", "strict") as mount:
            assert mount.status()["verify"] == "chunk"
        add(registry, "tar")
        target = tmp_path / "mnt"
        refused = ckptfs("mount", registry.reference("repo:latest"), target, "--verify", "strict")
        assert refused.code == 6 and "--verify auto" in refused.line


READERS = ["ls REF", "cat REF file", "cp REF file TMP/copy", "inspect REF", "show REF", "diff REF REF", "memparse REF"]
READERS += ["cache warm REF", "check REF", "stub REF --mount mnt --out TMP/stub.tar --criu-dir TMP/criu"]
READERS += ["restore REF --dir TMP/place", "restore REF --dir TMP/place --eager", "profile record REF -- cat {}/small"]


@pytest.mark.fuse
@pytest.mark.row("M11")
@each("words", READERS)
def test_strict_is_heeded_by_all_that_hand_out_bytes(words: str, tmp_path: Path) -> None:
    """As an option and as a setting; by a command that executes the memory most of all."""
    require("fusermount3", *["criu"] * words.startswith("restore"), root=True)
    with FakeRegistry() as registry:
        add(registry, "gzip")
        command, _, rest = words.replace("TMP", str(tmp_path)).partition("REF")
        cache, reference = {"CKPTFS_CACHE_DIR": str(tmp_path / "cache")}, registry.reference("repo:latest")
        for options, setting in ((["--verify", "strict"], {}), ([], {"CKPTFS_VERIFY": "strict"})):
            line = [*command.split(), *options, reference, *rest.replace("REF", reference).split()]
            refused = ckptfs(*line, env=cache | setting)
            assert refused.code == 6 and "cannot be verified chunk by chunk" in refused.line, refused
            assert {path.name for path in tmp_path.iterdir()} <= {"cache", "criu"}

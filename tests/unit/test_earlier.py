"""The next checkpoint of a process, opened on a node that has the one before: what it fetches (P11)."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from ckptfs.engine.cache import ChunkCache
from ckptfs.engine.shared_cells import Place, SharedCells
from ckptfs.errors import NotFoundError
from ckptfs.image import ImageOptions, open_image
from ckptfs.model.blob import Blob
from ckptfs.model.chunk_digest import ChunkDigest
from ckptfs.model.oci import Descriptor, Index, Manifest, Reference
from ckptfs.push import manifest
from ckptfs.sources.layout import LayoutSource
from ckptfs.telemetry import NetworkCounters
from tests.support.push import DATA, push_to_layout, two_checkpoints

PAGES = b"checkpoint/pages-1.img"


@dataclass
class CountedBlob(Blob):
    inner: Blob
    ranges: list[int]
    gone: bool = False

    @property
    def descriptor(self) -> Descriptor:
        return self.inner.descriptor

    @property
    def size(self) -> int:
        return self.inner.size

    def read_at(self, offset: int, length: int, *, attempt: int = 0) -> bytes:
        self._count(length)
        return self.inner.read_at(offset, length)

    def stream(
        self, offset: int, length: int, *, attempt: int = 0, patient: bool = False
    ) -> Iterator[bytes | memoryview]:
        self._count(length)
        return self.inner.stream(offset, length)

    def _count(self, length: int) -> None:
        if self.gone:
            raise NotFoundError("no such blob")
        self.ranges.append(length)


@dataclass
class CountedSource:
    """A layout, as if it were far away: counts what is read. Blobs in `gone` are no longer there."""

    inner: LayoutSource
    ranges: list[int] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)

    @property
    def reference(self) -> Reference:
        return self.inner.reference

    def resolve(self) -> Manifest | Index:
        document = self.inner.resolve()
        self.ranges.append(len(document.raw))
        return document

    def fetch(self, descriptor: Descriptor) -> bytes:
        return self.inner.fetch(descriptor)

    def blob(self, descriptor: Descriptor) -> CountedBlob:
        return CountedBlob(self.inner.blob(descriptor), self.ranges, str(descriptor.digest) in self.gone)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A layout with the images `first` and `second`, and the digest of each one's pages."""
    return push_two(tmp_path_factory.mktemp("earlier"))


@pytest.fixture(scope="module")
def without_pagemaps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The same of a process whose pagemaps are too large for the index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "_SMALL", 0)
        return push_two(tmp_path_factory.mktemp("earlier-large"))


def push_two(folder: Path) -> tuple[Path, dict[str, str]]:
    two_checkpoints(folder)
    digests = {}
    for name in ("first", "second"):
        push_to_layout(folder / f"{name}.tar", folder / "layout", name)
        tar = (folder / f"{name}.tar").read_bytes()
        at = tar.index(b"checkpoint/pages-1.img\0")
        size = int(tar[at + 124 : at + 135], 8)
        digests[name] = hashlib.sha256(tar[at + 512 : at + 512 + size]).hexdigest()
    return folder / "layout", digests


def read_pages(
    layout: Path, tag: str, cache: Path, *, keep: bool = True, gone: set[str] | None = None
) -> tuple[str, int]:
    """Open the image, read its pages; their digest and the bytes that were fetched."""
    source = CountedSource(LayoutSource(Reference.parse(f"oci:{layout}:{tag}")), gone=gone or set())

    async def run() -> str:
        chunks = ChunkCache.open(cache)
        try:
            options = ImageOptions(background=False, prefetch=False)
            async with open_image(source, chunks, options, NetworkCounters()) as image:
                node = await image.find(PAGES)
                assert node is not None
                assert node.inode is not None
                pages = await image.read(node.inode, 0, node.inode.size)
                if keep:  # as a mount does in the background
                    await image.tables.keep_cells()
                await image.fetcher.settled()  # what has been read is on its way to the disk
                return hashlib.sha256(pages).hexdigest()
        finally:
            chunks.close()

    return trio.run(run), sum(source.ranges)


CHANGED = json.loads((DATA / "two/pages.json").read_bytes())["changed_bytes_zstd3"]


@pytest.mark.parametrize("keep", [True, False])
def test_p11_the_next_checkpoint_fetches_what_changed(
    images: tuple[Path, dict[str, str]], keep: bool, tmp_path: Path
) -> None:
    layout, digests = images
    assert read_pages(layout, "first", tmp_path / "cache", keep=keep)[0] == digests["first"]
    digest, fetched = read_pages(layout, "second", tmp_path / "cache", keep=keep)
    assert digest == digests["second"]
    assert fetched <= 1.5 * CHANGED


def test_the_table_of_cells_serves_where_addresses_are_not_known(
    without_pagemaps: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    layout, digests = without_pagemaps
    for tag in ("first", "second"):
        digest, fetched = read_pages(layout, tag, tmp_path / "cache")
        assert digest == digests[tag]
    assert fetched <= 1.5 * CHANGED


def test_the_second_time_nothing_is_fetched(images: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    layout, digests = images
    for tag in ("first", "second"):
        read_pages(layout, tag, tmp_path / "cache")
    for tag in ("second", "first"):
        digest, fetched = read_pages(layout, tag, tmp_path / "cache")
        assert digest == digests[tag]
        assert fetched < 30_000  # the manifest, which a layout is asked for every time


def test_an_earlier_image_that_is_gone_costs_nothing(images: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    fetched = second_without_first(*images, tmp_path)
    assert fetched <= 1.5 * CHANGED


def test_where_its_table_is_needed_it_costs_the_saving_only(
    without_pagemaps: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    fetched = second_without_first(*without_pagemaps, tmp_path)
    assert fetched > 1_000_000


def second_without_first(layout: Path, digests: dict[str, str], tmp_path: Path) -> int:
    """Bytes fetched for the second image when the layers of the first are not to be had any more."""
    read_pages(layout, "first", tmp_path / "cache", keep=False)
    first = LayoutSource(Reference.parse(f"oci:{layout}:first")).resolve()
    assert isinstance(first, Manifest)
    digest, fetched = read_pages(
        layout, "second", tmp_path / "cache", gone={str(layer.digest) for layer in first.layers}
    )
    assert digest == digests["second"]
    return fetched


@pytest.mark.parametrize("digest", ChunkDigest)
def test_an_earlier_image_that_lies_is_found_out(digest: ChunkDigest, tmp_path: Path) -> None:
    """It says that a cell lies somewhere, and something else is there."""
    chunk, cell = bytes(range(256)) * 64, b"x" * 4096
    key, other = digest.of(cell), digest.of(chunk[4096:8192])
    with ChunkCache.open(tmp_path / "cache") as cache:
        cells = SharedCells(cache)
        whole = hashlib.sha256(chunk).digest()
        cache.put_many([(whole, chunk)])
        cells.add({key: Place(whole, 0, 4096, digest), other: Place(whole, 4096, 4096, digest)})
        assert cells.contains(key)
        assert cells.get(key) is None
        assert not cells.contains(key)
        assert cells.get(other) == chunk[4096:8192]
        cells.add({key: Place(whole, 1 << 40, 4096, digest)})
        assert cells.get(key) is None

"""Which pages of a checkpoint the one before has, with the same contents at the same address.

The new pages file is read once, front to back, 8 MiB at a time. Where the earlier image has the digest of a whole piece
(a cell of 16 KiB, or a chunk), the digest decides and nothing is fetched; pieces in which something differs are fetched
and compared page by page. So it takes as much of the earlier image as changed, in units of its cells. Blocks.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ckptfs.criu.memory import Memory
from ckptfs.criu.pagemap import Pagemap
from ckptfs.errors import FormatError
from ckptfs.layers.zstd_chunked_writer import Payload, read_exactly
from ckptfs.model.toc import Extent, overlapping
from ckptfs.push.checkpoint_files import CheckpointFile
from ckptfs.push.parent import ParentImage
from ckptfs.settings import MiB

_WINDOW = 8 * MiB


class _Item(NamedTuple):
    """Bytes [at, at + length) of the new file may be bytes from `skip` on of a piece of an earlier one."""

    at: int
    length: int
    path: bytes
    piece: Extent | None  # None: zeros
    skip: int


class Comparison:
    """Of one task's memory, or one shared object's, with what its pagemap and those of its parents were before.

    `directory` is where the earlier image has its pages files; `levels` its pagemaps, nearest first, and `sizes` those
    of the files, by name.
    """

    def __init__(
        self, parent: ParentImage, directory: bytes, levels: Sequence[Pagemap], sizes: dict[str, int], page_size: int
    ) -> None:
        self._parent = parent
        self._directory = directory
        self._memory = Memory(levels, sizes)
        self._page = page_size
        self._zero = bytes(page_size)
        self._pieces: dict[bytes, Sequence[Extent]] = {}
        self._last: dict[bytes, tuple[Extent, bytes]] = {}  # by file: the piece that the next window may go on with
        if self._memory.page_size != page_size:
            raise FormatError("the checkpoint before has pages of another size")

    def shared(self, pagemap: Pagemap, file: CheckpointFile, progress: Callable[[int], None]) -> bytearray:
        """One byte for each page in `file`: 1 when the earlier checkpoint has it. `progress` is told of bytes."""
        marks = bytearray(file.inode.size // self._page)
        if file.open is None or not marks:
            return marks
        payload = file.open()
        try:
            position = 0
            for items in _windows(self._items(pagemap)):
                start, end = items[0].at, items[-1].at + items[-1].length
                _skip(payload, start - position, file.path)
                self._compare(items, start, _read(payload, end - start, file.path), marks)
                progress(end - position)
                position = end
        finally:
            payload.close()
        return marks

    def _items(self, pagemap: Pagemap) -> Iterator[_Item]:
        for vaddr, offset, length, lazy in pagemap.placed(self._page):
            for place in self._memory.find(vaddr, length):
                if place.lazy != lazy:  # an increment has no place to say so
                    continue
                at, path = offset + place.vaddr - vaddr, self._directory + b"/" + place.file.encode()
                done, end = place.offset, place.offset + place.length
                for piece in overlapping(self._of(path), place.offset, place.length):
                    if piece.start % self._page or piece.length % self._page:
                        raise FormatError(f"{path.decode('utf-8', 'replace')!r} of the parent is cut within pages")
                    if piece.start > done:
                        yield _Item(at + done - place.offset, piece.start - done, path, None, 0)
                        done = piece.start
                    stop = min(piece.start + piece.length, end)
                    yield _Item(at + done - place.offset, stop - done, path, piece, done - piece.start)
                    done = stop
                if done < end:
                    yield _Item(at + done - place.offset, end - done, path, None, 0)

    def _of(self, path: bytes) -> Sequence[Extent]:
        if path not in self._pieces:
            self._pieces[path] = self._parent.pieces(path)
        return self._pieces[path]

    def _compare(self, items: list[_Item], start: int, data: bytes, marks: bytearray) -> None:
        grouped: dict[tuple[bytes, int], list[_Item]] = defaultdict(list)
        for item in items:
            if item.piece is None:
                self._by_page(item, data, start, b"", marks)
            else:
                grouped[item.path, item.piece.start].append(item)
        differing: dict[bytes, list[list[_Item]]] = defaultdict(list)
        for (path, _), parts in grouped.items():
            piece = parts[0].piece
            if piece is not None and sum(item.length for item in parts) == piece.length:
                mine = b"".join(data[item.at - start : item.at - start + item.length] for item in parts)
                if self._parent.chunk_digest(path).of(mine) == piece.chunk.digest:
                    for item in parts:
                        self._mark(item.at, item.length, marks)
                    continue
            differing[path].append(parts)
        for path, groups in differing.items():
            pieces = [parts[0].piece for parts in groups]
            decoded = self._fetch(path, [piece for piece in pieces if piece is not None])
            for parts, theirs in zip(groups, decoded, strict=True):
                for item in parts:
                    self._by_page(item, data, start, theirs, marks)

    def _by_page(self, item: _Item, data: bytes, start: int, theirs: bytes, marks: bytearray) -> None:
        """`theirs`: the decoded piece; unused for zeros."""
        page = self._page
        for done in range(0, item.length, page):
            mine = data[item.at - start + done : item.at - start + done + page]
            other = self._zero if item.piece is None else theirs[item.skip + done : item.skip + done + page]
            if mine == other:
                marks[(item.at + done) // page] = 1

    def _mark(self, at: int, length: int, marks: bytearray) -> None:
        count = length // self._page
        marks[at // self._page : at // self._page + count] = b"\1" * count

    def _fetch(self, path: bytes, pieces: list[Extent]) -> list[bytes]:
        layer = self._parent.layer_of(path)
        if layer is None:
            raise FormatError(f"the parent has no {path.decode('utf-8', 'replace')!r}")
        last = self._last.get(path)
        known = last is not None and last[0].start == pieces[0].start
        out = [last[1]] if last is not None and known else []
        out += self._parent.fetch(layer, pieces[len(out) :])
        self._last[path] = (pieces[-1], out[-1])
        return out


def _windows(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    """Items that lie within about 8 MiB of the new file; a piece is not torn unless its pages are far apart."""
    window: list[_Item] = []
    for item in items:
        if window:
            so_far = item.at - window[0].at
            torn = (
                item.piece is not None and window[-1].piece is not None and item.piece.start == window[-1].piece.start
            )
            if so_far >= 2 * _WINDOW or (so_far >= _WINDOW and not torn):
                yield window
                window = []
        if item.length > _WINDOW:  # a long stretch of zeros
            if window:
                yield window
            window = []
            yield from ([part] for part in _parts(item))
            continue
        window.append(item)
    if window:
        yield window


def _parts(item: _Item) -> Iterator[_Item]:
    for done in range(0, item.length, _WINDOW):
        length = min(_WINDOW, item.length - done)
        yield item._replace(at=item.at + done, length=length, skip=item.skip + done)


def _read(payload: Payload, length: int, path: bytes) -> bytes:
    data = bytearray(length)
    read_exactly(payload, memoryview(data), path)
    return bytes(data)


def _skip(payload: Payload, length: int, path: bytes) -> None:
    while length > 0:
        step = min(length, _WINDOW)
        _read(payload, step, path)
        length -= step

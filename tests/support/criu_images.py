"""CRIU images for tests: real ones unpacked from the corpus, and small ones written field by field.

The product writes pagemaps only (criu/increments.py). Called by tests of ckptfs/criu and ckptfs/inspection.
"""

import gzip
import io
import json
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import zstandard

from ckptfs.criu.images import _MAGICS, COMMON_MAGIC  # the table is checked against real images
from tests.support.tools import ROOT

CORPUS = ROOT / "tests" / "data" / "corpus"
DUMPS = ROOT / "tests" / "data" / "criu"  # config.dump, spec.dump and checkpointctl's output, by engine

Value = int | bytes | str | list["Value"] | Mapping[int, "Value"]


def varint(number: int) -> bytes:
    out = bytearray()
    number &= (1 << 64) - 1
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def message(fields: Mapping[int, Value]) -> bytes:
    """A protobuf message: numbers become varints, everything else bytes; a list is a repeated field."""
    out = bytearray()
    for number, value in fields.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int):
                out += varint(number << 3) + varint(one)
                continue
            data = _bytes(one)
            out += varint(number << 3 | 2) + varint(len(data)) + data
    return bytes(out)


def _bytes(value: Value) -> bytes:
    if isinstance(value, Mapping):
        return message(value)
    assert isinstance(value, str | bytes)
    return value.encode() if isinstance(value, str) else value


def record(fields: Mapping[int, Value], extra: bytes = b"") -> bytes:
    data = message(fields)
    return struct.pack("<I", len(data)) + data + extra


def image(kind: str, *records: Mapping[int, Value]) -> bytes:
    """An image of `kind` with these records."""
    return magic(kind) + b"".join(record(fields) for fields in records)


def magic(kind: str) -> bytes:
    """The eight bytes that an image of `kind` begins with (four for inventory.img)."""
    number = _MAGICS[kind]
    assert number is not None
    return struct.pack("<I", number) if kind == "inventory" else struct.pack("<II", COMMON_MAGIC, number)


def pagemap(pages_id: int, *runs: tuple[int, int, int]) -> bytes:
    """A pagemap of (vaddr, pages, flags) runs."""
    return image("pagemap", {1: pages_id}, *({1: vaddr, 2: n, 4: flags, 5: n} for vaddr, n, flags in runs))


def vma(start: int, end: int, *, flags: int = 0x22, status: int = 0x201, shmid: int = 0) -> dict[int, Value]:
    """A mapping; private and anonymous unless told otherwise."""
    return {1: start, 2: end, 3: 0, 4: shmid, 5: 3, 6: flags, 7: status, 8: 1}


def mm(*vmas: dict[int, Value], executable: int = 1, strings: tuple[int, int, int, int] = (0, 0, 0, 0)) -> bytes:
    """An address space; `strings` are arg_start, arg_end, env_start, env_end."""
    fields: dict[int, Value] = dict.fromkeys(range(1, 8), 0)
    fields.update(zip(range(8, 12), strings, strict=True))
    return image("mm", {**fields, 12: executable, 14: list(vmas)})


def task(pid: int, ppid: int = 0) -> dict[int, Value]:
    return {1: pid, 2: ppid, 3: pid, 4: pid, 5: [pid]}


def unpack_counter(folder: Path) -> Path:
    """The podman checkpoint of the corpus as a directory: dumps, and one process of 1.6 MB in checkpoint/."""
    layer = _layer("counter/k8s-zstd.oci")
    return _extract(zstandard.ZstdDecompressor().stream_reader(layer).read(), folder)


def unpack_tree(folder: Path, engine: str = "") -> Path:
    """The corpus's tree of three processes as a directory with checkpoint/, with dumps of an engine where asked."""
    root = _extract(gzip.decompress(_layer("tree/k8s-gzip.oci")), folder)
    if engine:
        for name in ("config.dump", "spec.dump"):
            (root / name).write_bytes((DUMPS / engine / name).read_bytes())
    return root


def _layer(layout: str) -> bytes:
    index = json.loads((CORPUS / layout / "index.json").read_bytes())
    blobs = CORPUS / layout / "blobs" / "sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"].partition(":")[2]).read_bytes())
    return (blobs / manifest["layers"][0]["digest"].partition(":")[2]).read_bytes()


def _extract(tar: bytes, folder: Path) -> Path:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        wanted = [member for member in archive if member.isfile() or member.isdir()]
        archive.extractall(folder, members=wanted, filter="data")
    return folder

"""Side documents for layers: indexes as `ckptfs index` makes them, and layers opened with a document."""

import struct

import xxhash
import zstandard

from ckptfs.layers import select_format
from ckptfs.layers.estargz import ExternalTable
from ckptfs.layers.indexed import Indexed
from ckptfs.layers.protocols import SideDocument
from ckptfs.layers.stream import StreamLayer
from ckptfs.model.layer_index import LayerIndex, encode_layer_index
from ckptfs.settings import Settings
from tests.support.blobs import TAR, BytesBlob, ScannedLayer, blob_of, layout_layer
from tests.support.tocs import estargz_footer
from tests.support.tools import ROOT

SETTINGS = Settings()
Made = tuple[BytesBlob, SideDocument]


def index_of(blob: BytesBlob) -> LayerIndex:
    """The index that one pass over the layer gives."""
    layer = StreamLayer(select_format(blob.descriptor).name, blob, 0, SETTINGS)
    index = layer.index(list(layer.scan(lambda chunk, data: None)))
    assert index is not None
    return index


def indexed(blob: BytesBlob, *, own: bool = False, document: bytes | None = None) -> Indexed:
    document = encode_layer_index(index_of(blob)) if document is None else document
    return Indexed.parse(document, blob.descriptor, SETTINGS, own=own)


def scanned(blob: BytesBlob, document: SideDocument) -> ScannedLayer:
    """The layer as a mount with this document shows it."""
    layer = document.open(blob, 0)
    found = ScannedLayer(layer, blob)
    found.entries.extend(layer.scan(found._emit))
    return found


def seekable(data: bytes, frame: int = 100_001, *, checksum: bool = True) -> bytes:
    """facebook/zstd contrib/seekable_format/zstd_seekable_compression_format.md."""
    packer = zstandard.ZstdCompressor()
    frames, rows = [], []
    for at in range(0, len(data), frame):
        piece = data[at : at + frame]
        frames.append(packer.compress(piece))
        rows.append(struct.pack("<II", len(frames[-1]), len(piece)))
        if checksum:
            rows.append(struct.pack("<I", xxhash.xxh64_intdigest(piece) & 0xFFFFFFFF))
    footer = struct.pack("<IBI", len(frames), 0x80 if checksum else 0, 0x8F92EAB1)
    table = b"".join(rows) + footer
    return b"".join(frames) + struct.pack("<II", 0x184D2A5E, len(table)) + table


def external_estargz() -> Made:
    """A layer of the corpus without its table, which is what --estargz-external-toc writes."""
    whole = layout_layer(ROOT / "tests/data/corpus/counter/k8s-estargz64k.oci")
    offset = int(whole.data[-51:][16:32], 16)
    footer = estargz_footer(0, b"SG\x11\x00STARGZEXTERNALTOC")
    assert len(footer) == 46
    annotations = dict(whole.descriptor.annotations)
    blob = blob_of(whole.data[:offset] + footer, TAR + "+gzip", annotations)
    table = whole.data[offset:-51]
    return blob, ExternalTable(lambda: table, SETTINGS)

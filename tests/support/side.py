"""Side documents for layers: indexes as `ckptfs index` makes them, and layers opened with a document."""

from ckptfs.layers import select_format
from ckptfs.layers.indexed import Indexed
from ckptfs.layers.protocols import SideDocument
from ckptfs.layers.stream import StreamLayer
from ckptfs.model.layer_index import LayerIndex, encode_layer_index
from ckptfs.settings import Settings
from tests.support.blobs import BytesBlob, ScannedLayer

SETTINGS = Settings()


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

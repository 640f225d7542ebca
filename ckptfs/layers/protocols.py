"""What every layer format is to the rest of ckptfs: protocols and one callback.

Owns no behaviour. Implemented by the modules of this package, used by image/ and engine/.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from ckptfs.errors import FormatError
from ckptfs.model.blob import Blob
from ckptfs.model.oci import Descriptor
from ckptfs.model.toc import Chunk, Entry
from ckptfs.settings import Settings

Verification = Literal["chunk", "transport"]

# Hands over a decoded chunk that came along while scanning. May block (back-pressure) and may raise to stop the scan.
Emit = Callable[[Chunk, bytes], None]


class Layer(Protocol):
    """One opened layer. `scan` runs in one thread; `decode` in several at once."""

    format: str
    verification: Verification
    # True: chunks cannot be fetched one by one, they only come out of `scan`, front to back.
    sequential: bool

    def scan(self, emit: Emit, *, attempt: int = 0) -> Iterator[Entry]:
        """The layer's entries in archive order, each as soon as it is known; ends when the layer is understood.

        A sequential layer emits every chunk of its stream, in order, and ends after the last one, when the digest of
        the whole blob has been checked (IntegrityError otherwise). `attempt` is handed to the Blob: a scan that ended
        with an IntegrityError can be made again with the next number.
        """

    def decode(self, chunk: Chunk, data: memoryview) -> bytes | memoryview:
        """The chunk's bytes out of its encoded ones; checked against its digest where it has one.

        IntegrityError for whatever is wrong with `data`: a flipped bit and a lying encoder look the same from here,
        and one more try elsewhere tells them apart.
        """


class WholeLayer(Layer, Protocol):
    """Chunks that can be fetched one by one and have no digest: the layer is right, or wrong, as a whole."""

    def chunks(self) -> Iterator[Chunk]:
        """All that hold bytes of the tar, in order."""


class LayerFormat(Protocol):
    @property
    def name(self) -> str: ...

    def matches(self, descriptor: Descriptor) -> bool:
        """Whether this format reads such a layer, judged by media type and annotations alone."""

    def open(self, blob: Blob, layer: int, settings: Settings) -> Layer:
        """`layer` is what the chunks' `layer` field will say. Does no I/O."""


class OtherFormat(FormatError):
    """Raised by a scan before its first entry: the layer is not what it is called, or cannot be read like that.

    `format` reads it, from the front.
    """

    def __init__(self, message: str, format_: LayerFormat) -> None:
        super().__init__(f"{message}: it has to be read from the front", hint="give --verify auto")
        self.args = message, format_  # of which copies are made
        self.format = format_


class SideLayer(Layer, Protocol):
    """A layer that was opened with the help of a side document."""

    # Its entries where the document tells them; None: `scan` finds them.
    entries: Sequence[Entry] | None


class SideDocument(Protocol):
    """What is known of a layer from outside of it: an index, a zTOC, a table of frames. Parsed and checked already."""

    def open(self, blob: Blob, layer: int) -> SideLayer:
        """Like `LayerFormat.open`, with the settings that the document was parsed with; raises nothing."""

"""The digests that name chunks: what a chunk's bytes are hashed with, and what an index calls it.

SHA-256 is what tables of contents demand (zstd:chunked, eStargz, SOCI) and what indexes of before have. BLAKE3 is what
`ckptfs push` writes into its index: a third of the time for each byte that is read (docs/adr/0016-chunk-digests.md).
Both have 32 bytes, so whoever compares has to know which one he has. Digests of blobs and documents are model/oci.py's.
"""

import hashlib
from enum import Enum

from blake3 import blake3

from ckptfs.errors import FormatError

DIGEST_BYTES = 32  # of each kind


class ChunkDigest(Enum):
    """The value is the name in an index, where none stands for SHA256."""

    SHA256 = "sha256"
    BLAKE3 = "blake3"

    def of(self, data: bytes | bytearray | memoryview) -> bytes:
        """The 32 bytes; in the calling thread. May be called by several at once."""
        return blake3(data).digest() if self is ChunkDigest.BLAKE3 else hashlib.sha256(data).digest()

    @classmethod
    def named(cls, name: object) -> "ChunkDigest":
        """FormatError for a name that is none of them."""
        for kind in cls:
            if kind.value == name:
                return kind
        raise FormatError(f"the index has digests of the kind {str(name)[:40]!r}", hint="install a newer ckptfs")

"""Encryption of what the cache keeps on disk, with a key that is only in memory.

Chunks and documents become AES-256-GCM ciphertext behind a random nonce, bound to their name (256 KiB in 240 us); names
become keyed hashes, so that the disk does not tell which known contents it holds. That a directory has one key is
key_mark.py's business. Needs the `cryptography` package (extra `encryption`). Called by cache.py.
"""

import hashlib
import os

from ckptfs.engine.disk import Buffer
from ckptfs.errors import UsageError

SECRET_BYTES = 16  # at least
_NONCE = 12  # random: safe for 2^32 chunks under one secret, 1 PB of them


class Seal:
    """Everything that is done with one secret. UsageError: it is too short, or the package is missing."""

    def __init__(self, secret: bytes) -> None:
        if len(secret) < SECRET_BYTES:
            raise UsageError(f"the cache key has {len(secret)} bytes", hint=f"give at least {SECRET_BYTES} random ones")
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            hint = "pip install 'ckptfs[encryption]'"
            raise UsageError("an encrypted cache needs the cryptography package", hint=hint) from None
        # Tells one key from another, and is of no use for finding a key with the entropy that it should have.
        self.fingerprint = _derive(secret, b"ckptfs mark")
        self._cipher = AESGCM(_derive(secret, b"ckptfs data"))
        self._names = _derive(secret, b"ckptfs names")
        self._invalid: type[Exception] = InvalidTag

    def name(self, key: bytes) -> bytes:
        """What a chunk or document is called on disk, 32 bytes."""
        return hashlib.blake2b(key, digest_size=32, key=self._names).digest()

    def encrypt(self, name: bytes, data: Buffer) -> bytes:
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, data, name)

    def decrypt(self, name: bytes, data: bytes | None) -> bytes | None:
        """The plain bytes; None where there are none that were sealed under this name."""
        if data is None:
            return None
        try:
            return self._cipher.decrypt(data[:_NONCE], memoryview(data)[_NONCE:], name)
        except (self._invalid, ValueError):
            return None


def _derive(secret: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(secret, digest_size=32, person=purpose).digest()

"""Several zstd frames with one call of the system's libzstd, where there is one.

A chunk that `ckptfs push` makes has a frame for each of its cells (docs/adr/0004-page-chunks.md). python-zstandard goes
through them giving the interpreter's lock away for each, 65 000 times for 1 GB, and waits to get it back: 0.15 s of the
3 that 1 GB takes with two threads. Called by compression.py, which says what is wrong with data that this one refuses.
"""

import ctypes
import functools

_NAME = "libzstd.so.1"
_OLDEST = 10400  # 1.4.0


class _Buffer(ctypes.Structure):
    """Py_buffer, as the C API of Python has it (Include/pybuffer.h)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)(
    ("PyObject_GetBuffer", ctypes.pythonapi)
)
_release_buffer = ctypes.PYFUNCTYPE(None, ctypes.POINTER(_Buffer))(("PyBuffer_Release", ctypes.pythonapi))
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_address = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyBytes_AsString", ctypes.pythonapi))


class Frames:
    """A context of decompression, for one thread at a time. Made by `frames`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._context: int | None = library.ZSTD_createDCtx()
        if self._context is None:
            raise MemoryError("libzstd has no memory for a context")

    def decompress(self, data: bytes | memoryview, length: int) -> bytes | None:
        """The `length` bytes that the frames in `data` hold together; None if they do not, for whatever reason.

        No more is written than `length` bytes, and no window is allocated, whatever the frames say.
        """
        source = _Buffer()
        _get_buffer(data, source, 0)
        try:
            # Not cleared first: the C API lets who has made it write to it, before anybody else has seen it
            out: bytes = _new_bytes(None, length)
            done = self._library.ZSTD_decompressDCtx(self._context, _address(out), length, source.buf, source.len)
        finally:
            _release_buffer(source)
        return out if done == length else None

    def __del__(self) -> None:
        if self._context is not None:
            self._library.ZSTD_freeDCtx(self._context)


def frames() -> Frames | None:
    """A new context; None where there is no libzstd to be used."""
    library = _library()
    return Frames(library) if library is not None else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_NAME)
        if library.ZSTD_versionNumber() < _OLDEST:
            return None
        library.ZSTD_createDCtx.restype = ctypes.c_void_p
        library.ZSTD_freeDCtx.argtypes = (ctypes.c_void_p,)
        size = ctypes.c_size_t
        library.ZSTD_decompressDCtx.argtypes = (ctypes.c_void_p, ctypes.c_void_p, size, ctypes.c_void_p, size)
        library.ZSTD_decompressDCtx.restype = size
    except (OSError, AttributeError):  # musl's loader, another kind of system, a library without these
        return None
    return library

"""Text for people at a terminal: names that can do nothing to it, and numbers of bytes.

Names come out of images, from whoever could push them: nothing else makes them fit to be shown. A pipe and JSON get
them as they are.
"""


def printable(text: str) -> str:
    r"""`text` in one line of characters that are seen, and do nothing but that.

    All others are escapes: control characters and line breaks (`\n`, `\x1b`), what changes the direction of text or
    has no width (`\u202e`), and bytes that were not UTF-8, as os.fsdecode has them (`\xff`). A backslash stays one.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else ascii(letter)[1:-1]


def size_text(count: float) -> str:
    """Bytes for people, as checkpointctl writes them: "1.6 MiB"."""
    if count < 1024:
        return f"{count:.0f} B"
    power = min((int(count).bit_length() - 1) // 10, 6)
    return f"{count / (1 << 10 * power):.1f} {'KMGTPE'[power - 1]}iB"

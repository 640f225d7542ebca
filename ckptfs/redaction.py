"""What must not be read in a log, an error or a status: secrets, and control characters that act on a terminal.

Two nets, because libraries log what they like: every secret that this process learns is known by its text
(`conceal`), and what looks like one is taken out wherever it comes from (userinfo, queries of URLs, where signatures
live, Authorization headers, tokens). Called by whoever learns a secret (sources/) and wherever text leaves the process.
"""

import logging
import re
import sys
import threading
from collections import OrderedDict
from urllib.parse import quote

_MASK = "***"
_SHORTEST = 6  # characters; a shorter "secret" would be masked inside ordinary words and tell itself by that
_KEPT = 64  # tokens are renewed every few minutes for months; the last ones are enough

# Compiled when first used (re keeps them): that takes 6 ms, and most mounts log nothing.
_PATTERNS = (
    (r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@\"']+@", rf"\1{_MASK}@"),
    # user:password@host without a scheme, but not repository:tag@sha256:...
    (r"(?<![\w.:@-])[^\s/@:\"'=]+:[^\s/@:\"']+@(?!sha\d+:)(?=[\w\[])", f"{_MASK}@"),
    (r"(?<=[\w/%.~-])\?[^\s\"'<>?]*=[^\s\"'<>]*", f"?{_MASK}"),
    (r"(?i)\b(authorization[\"']?\s*[:=]\s*[\"']?)(?:\w+\s+)?[^\s\"',}]+", rf"\1{_MASK}"),
    (r"(?i)\b(bearer|basic)\s+(?=\S*[\d=._])[A-Za-z0-9._~+/=-]{8,}", rf"\1 {_MASK}"),
    (
        r"(?i)([\"']?\b(?:\w*password|passwd|\w*secret|\w*token|auth|x-amz-\w+|\w*signature|api_?key)\b[\"']?"
        r"(?:=|:\s*(?=[\"']))[\"']?)[^\s\"',;&}]+",
        rf"\1{_MASK}",
    ),
    (r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*", _MASK),  # a JSON web token
)
_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"

_lock = threading.Lock()
_secrets: OrderedDict[str, None] = OrderedDict()


def conceal(*secrets: str) -> None:
    """From now on `redact` masks these texts, and how they look inside a URL."""
    with _lock:
        for secret in secrets:
            if len(secret) >= _SHORTEST:
                for form in {secret, quote(secret, safe="")}:
                    _secrets[form] = None
                    _secrets.move_to_end(form)
        while len(_secrets) > _KEPT:
            _secrets.popitem(last=False)


def redact(text: str) -> str:
    """`text` as it may be shown: secrets masked, control characters (but newline and tab) as \\xNN."""
    with _lock:
        known = list(_secrets)
    for secret in known:
        if secret in text:
            text = text.replace(secret, _MASK)
    for pattern, replacement in _PATTERNS:
        text = re.sub(pattern, replacement, text)
    return re.sub(_CONTROL, lambda found: ascii(found[0])[1:-1], text)


class RedactingFormatter(logging.Formatter):
    """The one formatter of the process: records of every library pass it, tracebacks with them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def log_to_stderr(level: int) -> None:
    """From now on log lines of `level` and above go to stderr, and bugs in threads with them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # urllib3 logs whole URLs at DEBUG, with the signatures of signed ones: twice is better
    logging.getLogger("urllib3").setLevel(logging.WARNING)
    threading.excepthook = _log_bug


def _log_bug(hook: threading.ExceptHookArgs) -> None:
    """An exception that ended a thread: to the log, where secrets are masked, not straight to stderr."""
    logging.getLogger("ckptfs").error("a thread ended", exc_info=hook.exc_value)

"""Secrets and terminal escapes never leave the process in text."""

import io
import logging

import pytest

from ckptfs import redaction
from ckptfs.daemon.requests import MountRequest, StoreRequest
from ckptfs.model.oci import Reference
from ckptfs.redaction import RedactingFormatter, conceal, redact


@pytest.mark.parametrize(
    "text",
    [
        "https://anna:CANARY1@host.example/v2/",
        "GET /v2/r/blobs/sha256:0?X-Amz-Signature=CANARY1&X-Amz-Credential=CANARY1 HTTP/1.1",
        "Redirecting http://a/b -> http://store.example/c?sig=CANARY1",
        "header: 'Authorization: Bearer CANARY1'",
        "{'Authorization': 'Basic CANARY1='}",
        "sent Basic Y2FuOkNBTkFSWTE=CANARY1",
        '{"errors": [{"message": "no", "token": "CANARY1"}]}',
        "{'access_token': 'CANARY1', 'expires_in': 3}",
        "identitytoken=CANARY1 was refused",
        '{"auths": {"h": {"auth": "CANARY1"}}}',
        "anna:CANARY1@host.example/repo:tag is no reference",
        "eyJhbGciOiJFUzI1NiJ9.CANARY1.CANARY1-x",
    ],
)
def test_what_looks_like_a_secret_is_masked(text: str) -> None:
    assert "CANARY1" not in redact(text) and "***" in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "host.example:5000/repo:tag@sha256:" + 64 * "0" + " is mounted on /mnt (12 ms)",
        "GET 127.0.0.1:5000/v2/repo/blobs/sha256:12 (try 2): 503; trying again in 0.25 s",
        "log in with `podman login host.example`; basic authentication, bearer of bad news",
        "what? a = b: the token has expired",
        'File "auth.py", line 3, in header\n    token = self._acquire(attempts)',
        "/mnt/a b\ttab ünïcode 日本",
    ],
)
def test_other_text_stays(text: str) -> None:
    assert redact(text) == text


def test_secrets_that_were_learnt_are_masked_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_secrets", type(redaction._secrets)())
    conceal("sw&rd fish", "tiny")
    assert redact("the body was: <sw&rd fish>, /a/sw%26rd%20fish/b, a tiny thing") == (
        "the body was: <***>, /a/***/b, a tiny thing"
    )
    for number in range(1000):
        conceal(f"token-{number}")
    assert len(redaction._secrets) <= 64 and redact("token-999 token-1") == "*** token-1"


def test_control_characters_cannot_act() -> None:
    assert redact("a\x1b[2J\x07b\r\x9bc\u202ed\ne") == "a\\x1b[2J\\x07b\\r\\x9bc\\u202ed\ne"


def test_every_record_passes_tracebacks_too() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    log = logging.Logger("library")
    log.addHandler(handler)
    try:
        raise ValueError("https://anna:CANARY2@host/ refused")
    except ValueError as error:
        log.error("%s", "http://h/?sig=CANARY2", exc_info=error)
    assert "CANARY2" not in stream.getvalue() and "Traceback" in stream.getvalue()


def test_a_request_does_not_show_its_cache_key() -> None:
    mount = MountRequest(Reference.parse("host.example/repo"), "/mnt", 0.0, cache_key=b"CANARY1")
    store = StoreRequest("/mnt", 0.0, cache_key=b"CANARY1")
    assert "CANARY1" not in f"{mount} {mount!r} {[store]}"

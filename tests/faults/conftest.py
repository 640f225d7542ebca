"""Fixtures of the fault tests. All of them are loud, and listened to for secrets: row S1."""

import logging
from collections.abc import Iterator

import pytest

from tests.support import command
from tests.support.faulty import faulty, secure, trusted
from tests.support.hanging import hanging, hanging_layer
from tests.support.hosts import hosts

__all__ = ["faulty", "hanging", "hanging_layer", "hosts", "secure", "trusted"]


@pytest.fixture(autouse=True)
def _no_secret_is_told(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Passwords, tokens, signatures and error bodies of the registries here say "canary"; logs and commands do not."""
    caplog.set_level(logging.DEBUG)
    command.heard = []
    try:
        yield
        form = logging.Formatter("%(name)s %(message)s").format
        told = [*map(form, caplog.get_records("call")), *command.heard]
        assert not [text for text in told if "canary" in text]
    finally:
        command.heard = None

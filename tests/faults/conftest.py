"""Fixtures of the fault tests."""

from tests.support.faulty import faulty, secure, trusted
from tests.support.hanging import hanging, hanging_layer
from tests.support.hosts import hosts

__all__ = ["faulty", "hanging", "hanging_layer", "hosts", "secure", "trusted"]

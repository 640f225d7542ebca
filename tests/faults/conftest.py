"""Fixtures of the network's fault tests."""

from tests.support.faulty import faulty, secure, trusted

__all__ = ["faulty", "secure", "trusted"]

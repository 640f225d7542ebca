"""Fixtures of the fault tests."""

from tests.support.faulty import faulty, secure, trusted
from tests.support.hanging import hanging, hanging_layer

__all__ = ["faulty", "hanging", "hanging_layer", "secure", "trusted"]

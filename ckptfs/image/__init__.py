"""Composition root: from a Reference to an open image with names, bytes and facts."""

from ckptfs.image.opened import ImageOptions, OpenImage, View, open_image

__all__ = ["ImageOptions", "OpenImage", "View", "open_image"]

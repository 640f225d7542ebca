"""Mount a container checkpoint that lives in a registry, and read only what is asked for."""

__version__ = "0.1.0"

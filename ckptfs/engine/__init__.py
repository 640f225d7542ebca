"""Bytes of files: memory, disk, fetch. Decides who is fetched next, and keeps what has been fetched."""

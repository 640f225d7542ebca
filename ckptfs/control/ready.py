"""Telling a service manager or a parent that the mount works: sd_notify(3) and an inherited descriptor (--ready-fd)."""

import fcntl
import logging
import os
import socket

from ckptfs.errors import UsageError

log = logging.getLogger(__name__)


def notify(message: str) -> None:
    """Send `message` ("READY=1", "STOPPING=1") to systemd; does nothing where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(message.encode(), "\0" + address[1:] if address[0] == "@" else address)
    except OSError as error:
        log.warning("systemd cannot be told that %s: %s", message, error.strerror)


def require_inherited(fd: int) -> None:
    """UsageError unless whoever started us has left `fd` open for writing. Files that Python opens end at an exec."""
    try:
        given = not fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        given &= fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except (OSError, OverflowError):
        given = False
    if not given:
        raise UsageError(f"descriptor {fd} is not open for writing", hint="--ready-fd names one that you have opened")


def tell(fd: int) -> None:
    """Write one line to `fd` and close it; whoever waits there may have given up."""
    try:
        os.write(fd, b"ready\n")
        os.close(fd)
    except OSError as error:
        log.warning("descriptor %d cannot be told that the mount is ready: %s", fd, error.strerror)

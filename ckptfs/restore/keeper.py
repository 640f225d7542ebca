"""Who stays with the container: this command, or a process that it leaves behind (`--detach`).

Owns the fork and what comes back over the pipe, and who does the rest: container.py, podman.py or containerd.py. Called
by the command line.
"""

import json
import os
import signal
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from ckptfs.control.ready import notify
from ckptfs.daemon import standby
from ckptfs.errors import CkptfsError, rebuilt, told
from ckptfs.hardening import close_inherited
from ckptfs.interrupts import as_before, interrupt_by, lines
from ckptfs.restore.flow import Report, RestoreRequest, begun
from ckptfs.restore.supervise import SIGNALS

_NOTIFY = "NOTIFY_SOCKET"


def restore(request: RestoreRequest, report: Report) -> None:
    """Restore, tell systemd when it runs, stay until the container has ended (or the engine has it)."""
    # The daemons of mounts would say that they are ready, and runc would wait for the container to say so.
    listener = os.environ.pop(_NOTIFY, None)

    def tell(event: str, **facts: object) -> None:
        if event == "running" and listener is not None:
            os.environ[_NOTIFY] = listener
            notify("READY=1")
            del os.environ[_NOTIFY]
        report(event, **facts)

    own_root = request.engine != "podman"
    engine = engine_of(request)
    with begun(request, tell, base=own_root and request.rootfs is None and not request.image_store) as flow:
        if engine is None:
            from ckptfs.restore import container

            engine = container
        engine.finish(flow)


def engine_of(request: RestoreRequest) -> ModuleType | None:
    """What restores it, None for us. UsageError for options that mean nothing to the engine."""
    if request.engine is None:
        return None
    engine = import_module(f"ckptfs.restore.{request.engine}")
    engine.refuse_options(request)
    return engine


def restore_detached(request: RestoreRequest, report: Report) -> None:
    """Return when the container runs; a child stays, without a terminal, and cleans up when it has ended.

    Once it runs, signals are ignored: this command is about to end, and would say that it has failed.
    """
    standby.dismiss()
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    before = interrupt_by(*SIGNALS, once=True)
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until it is known which child there is to be ended
    child = os.fork()
    if child == 0:
        os.close(reader)
        as_before(before)
        _keep(request, writer, heard)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        os.close(writer)
        for line in lines(reader, child):
            message = json.loads(line)
            if "error" in message:
                os.waitpid(child, 0)
                raise rebuilt(message)
            report(message.pop("event"), **message)
            if "pid" in message:
                for number in (*SIGNALS, signal.SIGALRM):
                    signal.signal(number, signal.SIG_IGN)
                before = {}
                return
    except (KeyboardInterrupt, OSError):  # what has failed, or could not be told, leaves nothing that runs
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(reader)
        as_before(before)
    os.waitpid(child, 0)
    raise CkptfsError("the process that stays with the container ended early")


def _keep(request: RestoreRequest, writer: int, heard: set[int]) -> None:
    """The child's whole life; never returns. `heard`: the mask of signals that it shall have."""
    pipe: int | None = writer

    def send(message: dict[str, Any]) -> None:
        if pipe is not None:
            os.write(pipe, json.dumps(message).encode() + b"\n")

    def report(event: str, **facts: object) -> None:
        nonlocal pipe
        send({"event": event, **facts})
        if event == "running" and pipe is not None:
            os.close(pipe)
            pipe = None

    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        close_inherited({0, 1, 2})
        os.chdir("/")
        restore(request, report)
    except BaseException as error:
        message = told(error)
        code = message["code"]
        send(message)
    finally:
        os._exit(code)

"""containerd's API as far as a restore needs it: a container, its task, and what becomes of it.

Owns eight calls and their messages (api/services/{containers,tasks}/v1 and runtime/v2/runc/options/oci.proto of
containerd), encoded by hand: they are a dozen fields. `ctr` cannot say where the CRIU images are, the API can
(criu_image_path). Needs grpcio, which is imported only here. Called by containerd.py.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ckptfs.criu.wire import Message, encoded
from ckptfs.errors import CkptfsError, RestoreError, UnavailableError
from ckptfs.restore.checking import Finding

_SOCKET = "/run/containerd/containerd.sock"
_RUNTIME = "io.containerd.runc.v2"
_SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_OPTIONS_TYPE = "containerd.runc.v1.Options"
_OWNER = "dev.ckptfs.restore"  # label of a container: the directory of the restore that has made it
_PATIENCE = 30.0  # seconds for a call that does not wait for a restore


def address() -> str:
    """Of containerd's socket, as `ctr` finds it."""
    return os.environ.get("CONTAINERD_ADDRESS", _SOCKET)


def findings() -> Iterator[Finding]:
    """Whether containerd can be spoken to; nothing is imported or started."""
    found = importlib.util.find_spec("grpc") is not None
    detail = "grpcio" if found else "the Python package grpcio, which speaks to containerd, is missing"
    yield Finding("grpcio", found, detail, "pip install 'ckptfs[containerd]'")
    there = os.path.exists(address())
    detail = address() if there else f"containerd does not listen at {address()}"
    yield Finding("containerd", there, detail, "start it, or name its socket in CONTAINERD_ADDRESS")


class Containerd:
    """A connection. Every call raises RestoreError with containerd's words when it says no.

    `place` is (socket, namespace); without one, those that `ctr` takes.
    """

    def __init__(self, place: Sequence[str] | None = None) -> None:
        import grpc

        self._grpc = grpc
        self.place = place or (os.path.abspath(address()), os.environ.get("CONTAINERD_NAMESPACE", "default"))
        self._channel = grpc.insecure_channel(f"unix://{self.place[0]}")
        self._metadata = (("containerd-namespace", self.place[1]),)

    def close(self) -> None:
        self._channel.close()

    def create_container(self, name: str, spec: bytes, *, owner: str) -> None:
        """A container without a snapshot: its root file system is where the spec says."""
        label = _string(1, _OWNER) + _string(2, owner)
        runtime = _string(1, _RUNTIME)
        container = _string(1, name) + _bytes(2, label) + _bytes(4, runtime) + _bytes(5, _any(_SPEC_TYPE, spec))
        self._call("containers.v1.Containers/Create", _bytes(1, container))

    def has(self, name: str, *, owner: str) -> bool:
        """Whether it has the container that was made for `owner`; one of that name may be somebody else's."""
        answer = self._call("containers.v1.Containers/List", _string(1, f'id=="{name}"'))
        labels = [label for container in answer.messages(1) for label in container.messages(2)]
        return any(label.text(1, "") == _OWNER and label.text(2, "") == owner for label in labels)

    def create_task(
        self, name: str, images: Path, work: Path, stdout: str, stderr: str, *, binary: str, terminal: bool
    ) -> None:
        """The task that will be restored from `images`, which are read where they are. Nothing runs yet."""
        options = _string(6, binary) + _string(10, str(images)) + _string(11, str(work))
        request = _string(1, name) + _string(5, stdout) + _string(6, stderr) + _number(7, terminal)
        self._call("tasks.v1.Tasks/Create", request + _bytes(9, _any(_OPTIONS_TYPE, options)))

    def start(self, name: str) -> int:
        """Restore; returns the pid when the task runs."""
        return self._call("tasks.v1.Tasks/Start", _string(1, name), patience=None).uint(1)

    def wait(self, name: str) -> int:
        """The exit code of a task that has ended, or is about to."""
        return self._call("tasks.v1.Tasks/Wait", _string(1, name)).uint(1, 0)

    def kill(self, name: str, signal: int) -> None:
        self._call("tasks.v1.Tasks/Kill", _string(1, name) + _number(3, signal) + _number(4, True))

    def delete_task(self, name: str) -> None:
        self._call("tasks.v1.Tasks/Delete", _string(1, name))

    def delete_container(self, name: str) -> None:
        self._call("containers.v1.Containers/Delete", _string(1, name))

    def _call(self, method: str, request: bytes, *, patience: float | None = _PATIENCE) -> Message:
        call: Any = self._channel.unary_unary(f"/containerd.services.{method}")
        try:
            answer = call(request, timeout=patience, metadata=self._metadata)
        except self._grpc.RpcError as error:
            raise self._translated(error) from None
        return Message(answer, f"containerd's answer to {method}")

    def _translated(self, error: Any) -> CkptfsError:
        said, code = " ".join(str(error.details()).split()), error.code()
        if code in (self._grpc.StatusCode.UNAVAILABLE, self._grpc.StatusCode.DEADLINE_EXCEEDED):
            return UnavailableError(f"containerd does not answer: {said}", hint=f"is it running at {self.place[0]}?")
        if code == self._grpc.StatusCode.ALREADY_EXISTS:
            return RestoreError(f"containerd has it already: {said}", hint="give another --name")
        return RestoreError(f"containerd says: {said}")


def _any(kind: str, value: bytes) -> bytes:
    return _string(1, kind) + _bytes(2, value)


def _string(number: int, text: str) -> bytes:
    """Like all fields of proto3: nothing where it has its default."""
    return _bytes(number, text.encode()) if text else b""


def _bytes(number: int, value: bytes) -> bytes:
    return encoded(number << 3 | 2) + encoded(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return encoded(number << 3) + encoded(value) if value else b""

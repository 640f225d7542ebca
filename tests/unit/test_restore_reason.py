"""What a restore that failed says of its mounts: the reads that failed in them, as what they are, and nothing else."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptfs.errors import AuthError, CkptfsError, FormatError, IntegrityError, RestoreError, UnavailableError, told
from ckptfs.restore import flow

EIO = "runc could not restore: Can't read pages: Input/output error"
DENIED = "criu could not restore: Can't open pages-1.img: Permission denied"


def failed(error: CkptfsError) -> dict[str, Any]:
    """As a status has it (fuse/answers.py)."""
    return {**told(error), "operation": "read", "errno": error.errno}


def reason(said: CkptfsError, place: Path, monkeypatch: pytest.MonkeyPatch, *failures: CkptfsError) -> CkptfsError:
    monkeypatch.setattr(flow, "statuses", lambda directory: [{"failures": list(map(failed, failures))}])
    return flow.Flow.reason(SimpleNamespace(place=place), said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "failure", "hint"),
    [
        (EIO, UnavailableError("read pages-1.img: no answer"), "--read-deadline hard"),
        (EIO, IntegrityError("read pages-1.img: wrong bytes twice"), ""),
        (EIO, FormatError("lookup core-1.img: a tar of negative size"), ""),
        (EIO, CkptfsError("internal error in read: KeyError"), ""),
        (DENIED, AuthError("read pages-1.img: the registry refused", hint="log in"), "log in"),
    ],
)
def test_a_runtime_is_excused_by_reads_that_failed(
    said: str, failure: CkptfsError, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = UnavailableError("read config.dump: no answer")
    found = reason(RestoreError(said, hint="the logs"), tmp_path, monkeypatch, earlier, failure)
    assert found.message == f"{said}: {failure.message}"
    assert found.exit_code == failure.exit_code
    assert found.hint.startswith(hint) and bool(found.hint) == bool(hint)


@pytest.mark.parametrize(
    ("said", "failures"),
    [
        (EIO, []),
        (EIO, [AuthError("lookup checkpoint/x: the registry refused")]),
        (DENIED, [UnavailableError("lookup checkpoint/x: no answer")]),
    ],
)
def test_nothing_else_excuses_it(
    said: str, failures: list[CkptfsError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RestoreError(said, hint="look at the logs")
    assert reason(error, tmp_path, monkeypatch, *failures) is error


def test_a_runtime_that_could_read_is_not_excused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RestoreError("runc could not restore: a file has another size", hint="look at the logs")
    assert reason(error, tmp_path, monkeypatch, UnavailableError("lookup checkpoint/x: no answer")) is error


def test_a_read_of_ours_that_failed_is_told_as_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the kernel says of it is EIO."""
    error = UnavailableError("spec.dump cannot be read: Input/output error", hint="the network failed: try it again")
    found = reason(error, tmp_path, monkeypatch, IntegrityError("read spec.dump: wrong bytes twice"))
    assert (found.exit_code, found.hint) == (IntegrityError.exit_code, "") and IntegrityError.errno == errno.EIO

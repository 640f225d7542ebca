"""What a restore that failed says of its mounts: the reads that failed in them, and nothing else."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptfs.errors import RestoreError, UnavailableError
from ckptfs.restore import flow


@pytest.mark.parametrize(
    ("told", "quoted"),
    [
        ([], ""),
        (["directories above the delta are shown as root's, 0755: there is no such image"], ""),
        (
            ["layer sha256:1 arrived with another digest", "lookup checkpoint/x: no answer"],
            "lookup checkpoint/x: no an",
        ),
        (["read pages-1.img at 0 (9 bytes): no answer", "the index is not published: it is full"], "read pages-1.img"),
        (["internal error in read: KeyError"], "internal error in read"),
    ],
)
def test_a_runtime_is_excused_by_reads_that_failed_and_by_nothing_else(
    told: list[str], quoted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "statuses", lambda directory: [{"errors": told}])
    error = RestoreError("runc could not restore: Can't read pages: Input/output error", hint="look at the logs")
    found = flow.Flow.reason(SimpleNamespace(place=tmp_path), error)  # type: ignore[arg-type]
    if quoted:
        assert isinstance(found, UnavailableError) and quoted in found.message
    else:
        assert found is error


def test_a_runtime_that_could_read_is_not_excused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "statuses", lambda directory: [{"errors": ["lookup checkpoint/x: no answer"]}])
    error = RestoreError("runc could not restore: a file has another size", hint="look at the logs")
    assert flow.Flow.reason(SimpleNamespace(place=tmp_path), error) is error  # type: ignore[arg-type]

"""One test for many cases that wait, or are a process each: a machine with several cores does several at a time."""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_OWN = ("folder", "tmp_path")


def each(names: str, cases: Iterable[Any], at_once: int | None = None) -> Callable[[Callable[..., None]], Any]:
    """As pytest.mark.parametrize, but all cases are one test, of which all that fail are told.

    Every case has a `folder` (or `tmp_path`) of its own, which other users can look into. What else the test takes are
    fixtures, the same for all. `at_once`: so many, not one for each core.
    """
    keys = [name.strip() for name in names.split(",")]
    wanted = [dict(zip(keys, case if len(keys) > 1 else (case,), strict=True)) for case in cases]

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(check).parameters

        def failure(case: dict[str, Any], folder: Path) -> Exception | None:
            folder.mkdir(mode=0o755)
            try:
                check(**case, **{name: folder for name in _OWN if name in parameters})
            except Exception as error:
                error.add_note(f"with {case}")
                return error
            return None

        def test(**fixtures: Any) -> None:
            everything = [{**case, **fixtures} for case in wanted]
            with (
                tempfile.TemporaryDirectory(dir="/var/tmp") as name,
                ThreadPoolExecutor(at_once or os.cpu_count()) as pool,
            ):
                Path(name).chmod(0o755)
                folders = [Path(name) / str(number) for number in range(len(wanted))]
                failed = [error for error in pool.map(failure, everything, folders) if error is not None]
            if failed:
                raise ExceptionGroup(f"{len(failed)} of {len(wanted)}", failed)

        fixtures = [one for one in parameters.values() if one.name not in (*keys, *_OWN)]
        test.__signature__ = inspect.Signature(fixtures)  # type: ignore[attr-defined]  # what pytest looks at
        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate

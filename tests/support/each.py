"""One test for many cases that wait, or are a process each: a machine with several cores does several at a time."""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = "folder"


def each(names: str, cases: Iterable[Any], at_once: int | None = None) -> Callable[[Callable[..., None]], Any]:
    """As pytest.mark.parametrize, but all cases are one test, of which all that fail are told.

    Every case has a `folder` of its own that others can look into. Other parameters are fixtures, made once for all.
    `at_once`: so many, not one for each core.
    """
    keys = [name.strip() for name in names.split(",")]
    wanted = [dict(zip(keys, case if len(keys) > 1 else (case,), strict=True)) for case in cases]

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(check).parameters

        def failure(case: dict[str, Any], folder: Path) -> Exception | None:
            folder.mkdir(mode=0o755)
            try:
                check(**case, **({FOLDER: folder} if FOLDER in parameters else {}))
            except Exception as error:
                error.add_note(f"with {case}")
                return error
            return None

        def test(**fixtures: Any) -> None:
            with (
                tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
                ThreadPoolExecutor(at_once or os.cpu_count()) as pool,
            ):
                Path(folder).chmod(0o755)
                folders = (Path(folder) / str(number) for number in range(len(wanted)))
                failed = [
                    error for error in pool.map(failure, ({**case, **fixtures} for case in wanted), folders) if error
                ]
            if failed:
                raise ExceptionGroup(f"{len(failed)} of {len(wanted)}", failed)

        fixtures = [one for one in parameters.values() if one.name not in (*keys, FOLDER)]
        test.__signature__ = inspect.Signature(fixtures)  # type: ignore[attr-defined]  # what pytest looks at
        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate

"""One test for many commands: each is a process, and a machine with several cores runs several of them at a time."""

import inspect
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_OURS = ("name", "folder")


def each(names: Iterable[str], at_once: int | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Call the test with every `name`, and a `folder` of its own that others can look into; tell all that fail.

    Other parameters are fixtures, made once for all. `at_once`: so many, not one for each core.
    """
    wanted = list(names)

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        def test(**fixtures: Any) -> None:
            with (
                tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
                ThreadPoolExecutor(at_once or os.cpu_count()) as pool,
            ):
                Path(folder).chmod(0o755)

                def one(number: int, name: str) -> Exception | None:
                    own = Path(folder) / str(number)
                    own.mkdir(mode=0o755)
                    found = {"name": name, "folder": own, **fixtures}
                    try:
                        check(**{key: found[key] for key in inspect.signature(check).parameters})
                    except Exception as error:
                        error.add_note(f"with {name!r}")
                        return error
                    return None

                failed = [error for error in pool.map(one, range(len(wanted)), wanted) if error is not None]
            if failed:
                raise ExceptionGroup(f"{len(failed)} of {len(wanted)}", failed)

        parameters = inspect.signature(check).parameters
        fixtures = [parameter for name, parameter in parameters.items() if name not in _OURS]
        test.__signature__ = inspect.Signature(fixtures)  # type: ignore[attr-defined]  # what pytest looks at
        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        return test

    return decorate

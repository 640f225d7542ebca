"""Coverage-guided fuzzing of every parser of what others wrote, with atheris.

    python -m tests.soak.fuzz [TARGET SECONDS]

Whatever the bytes are, a parser ends with a value or with an error of ckptfs/errors.py, soon and in little memory;
anything else is a crash whose input libFuzzer writes down. Begins with honest documents. Without a target: their names.
Used by the soak.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ckptfs"]):
    from ckptfs.errors import CkptfsError
    from tests.support.fuzzed import TARGETS


def main(name: str, seconds: int) -> None:
    target = TARGETS[name]

    def once(data: bytes) -> None:
        try:
            target.parse(data)
        except CkptfsError:
            pass

    corpus = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
        target.parse(seed)  # an honest document is understood
    limits = [f"-max_total_time={seconds}", "-max_len=20000", "-timeout=10", "-rss_limit_mb=2048"]
    told = ["-verbosity=0", "-print_final_stats=1", f"-artifact_prefix={corpus}/crash-"]
    atheris.Setup([sys.argv[0], *limits, *told, str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("\n".join(TARGETS))
    else:
        main(sys.argv[1], int(sys.argv[2]))

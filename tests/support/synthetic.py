"""Files with every kind of end and content, and GNU tar's archive of them. Called by tests of random reads."""

from pathlib import Path
from random import Random

from tests.support.tools import run

MIB = 1 << 20


def synthetic_tar(folder: Path) -> bytes:
    """A tar by GNU tar, holes kept, of files with every kind of end and content; the files stay in `folder`."""
    rng = Random(7)
    folder.mkdir()
    for size in (0, 1, 511, 4096, 100_003):
        (folder / f"of-{size}").write_bytes(rng.randbytes(size))
    (folder / "big").write_bytes(b"".join(rng.randbytes(7000) + bytes(rng.randrange(9000)) for _ in range(500)))
    (folder / "zeros").write_bytes(bytes(3 * MIB))
    with (folder / "sparse").open("wb") as file:
        for at in (0, 300_000, 1_000_000, 1_004_096, 5_000_001):
            file.seek(at)
            file.write(rng.randbytes(9_999))
        file.truncate(8 * MIB + 5)
    archive = folder.parent / "layer.tar"
    run("tar", "--create", "--sparse", "--format=gnu", "--file", archive, "--directory", folder, ".")
    return archive.read_bytes()

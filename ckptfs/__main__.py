"""`ckptfs` and `python -m ckptfs`: errors become one line and an exit code here."""

import sys


def main() -> None:
    from ckptfs.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

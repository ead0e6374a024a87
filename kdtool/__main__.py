"""`python -m kdtool` and the console script."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from kdtool.cli.app import run
    from kdtool.cli.torchrun import leave_code, shield

    shield()
    sys.exit(leave_code(run()))


if __name__ == "__main__":
    main()

"""Where does ``k5train`` begin? Ctrl-C is answered from here on, also during the imports of the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``k5train`` and of ``python -m k5train``."""
    try:
        from k5train.cli import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        sys.stderr.write("Stopped before the command began: nothing was done\n")
        sys.exit(130)


if __name__ == "__main__":
    main()

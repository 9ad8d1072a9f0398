"""`python -m twn_rl.cli`, for launchers that start modules: the same as `twn-rl`."""

import sys

from twn_rl.cli import main

if __name__ == "__main__":
    sys.exit(main())

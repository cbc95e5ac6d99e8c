"""`python -m fastgen`: the command line."""

import sys

from fastgen.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

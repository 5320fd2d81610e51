"""`python -m autodeploy`: the command line."""

import sys

from autodeploy.cli import main

if __name__ == "__main__":
    sys.exit(main())

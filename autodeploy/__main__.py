"""`python -m autodeploy`: the command line."""

import sys

from autodeploy.app.cli import main

if __name__ == "__main__":
    sys.exit(main())

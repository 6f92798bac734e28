"""``python -m quantine``: the program `quantine`, as torchrun starts it."""

import sys

from quantine.cli import main

sys.exit(main())

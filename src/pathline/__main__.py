"""`python -m pathline` is the command `pathline`."""

import sys

from .cli import main

sys.exit(main())

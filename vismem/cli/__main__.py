"""`python -m vismem.cli`."""

import sys

from vismem.cli import main

sys.exit(main())

"""`python -m normkit` is the command `normkit`."""

import sys

from normkit.cli.main import main

sys.exit(main())

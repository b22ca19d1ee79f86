"""`python -m hrmcore` is the `hrmcore` command."""

import sys

from hrmcore.cli import main

sys.exit(main())

"""``python -m paredown`` is the command line."""

import sys

from paredown.commands import main

sys.exit(main())

"""``python -m dense2conv`` and ``torchrun -m dense2conv`` are ``dense2conv``."""

import sys

from dense2conv.cli import main

sys.exit(main())

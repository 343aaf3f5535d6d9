"""A script of a user's, which ends the process where it is imported."""

import sys

sys.exit(0)

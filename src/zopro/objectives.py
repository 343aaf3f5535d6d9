"""Its old name: `zopro.train.objectives`."""

from zopro.train.objectives import *  # noqa: F403

"""Align language models by function evaluations instead of gradients: ZOPrO (arXiv 2503.03460) and the tools around it.

The public names are imported on first use, so that `import zopro` and `zopro --help` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zopro.config import RunConfig
    from zopro.errors import InputError
    from zopro.loop.handle import RunHandle, load, run
    from zopro.train.es import ESConfig, ESTrainer
    from zopro.train.guided import GuidedConfig, GuidedTrainer
    from zopro.train.zeroth_order import zeroth_order
    from zopro.train.zopro import ZOPrOConfig, ZOPrOTrainer
    from zopro.zo import ES, SPSA, Gaussian, LowRank, Rademacher, ResidualFeedback, Signs, Targeted

__version__ = "0.1.0"

__all__ = [
    "ES",
    "SPSA",
    "ESConfig",
    "ESTrainer",
    "Gaussian",
    "GuidedConfig",
    "GuidedTrainer",
    "InputError",
    "LowRank",
    "Rademacher",
    "ResidualFeedback",
    "RunConfig",
    "RunHandle",
    "Signs",
    "Targeted",
    "ZOPrOConfig",
    "ZOPrOTrainer",
    "__version__",
    "load",
    "run",
    "zeroth_order",
]

_HOME = {
    "ES": "zopro.zo",
    "SPSA": "zopro.zo",
    "Gaussian": "zopro.zo",
    "LowRank": "zopro.zo",
    "Rademacher": "zopro.zo",
    "Signs": "zopro.zo",
    "Targeted": "zopro.zo",
    "ResidualFeedback": "zopro.zo",
    "ESConfig": "zopro.train.es",
    "ESTrainer": "zopro.train.es",
    "GuidedConfig": "zopro.train.guided",
    "GuidedTrainer": "zopro.train.guided",
    "ZOPrOConfig": "zopro.train.zopro",
    "ZOPrOTrainer": "zopro.train.zopro",
    "zeroth_order": "zopro.train.zeroth_order",
    "RunConfig": "zopro.config",
    "RunHandle": "zopro.loop.handle",
    "load": "zopro.loop.handle",
    "run": "zopro.loop.handle",
    "InputError": "zopro.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'zopro' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

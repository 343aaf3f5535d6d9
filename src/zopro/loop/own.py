"""A method and noise of the user's, from modules that Python finds: looked at before the first stage.

check_own(config)       # a step would find what is wrong after other stages are done
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from zopro.choices import BACK_PROPAGATION, DIRECTIONS, FUNCTION_VALUES, METHODS, SWEEP, made_by
from zopro.config import RunConfig
from zopro.config.heeded import GROUPS
from zopro.config.step import PRESETS
from zopro.errors import InputError
from zopro.zo.directions import Directions, noise_source

USES = (FUNCTION_VALUES, SWEEP, BACK_PROPAGATION)


def check_own(config: RunConfig, tensor: tuple[str, torch.Tensor] | None = None) -> None:
    """Raise `InputError` for a method or noise of one's own that cannot be imported, or is none.

    tensor: a parameter of the policy and its name, for which noise is drawn to be looked at; None: it is not.
    """
    if config.method.startswith("python:"):
        _check_method(config)
    if config.noise.startswith("python:"):
        DIRECTIONS[config.noise]  # it can be imported
        rule = "noise: must be a class of zopro.zo.Directions that is made without arguments"
        made: Directions = made_by(config.noise, lambda: noise_source(config.noise, {}), Directions, rule)
        if tensor is not None:
            _check_drawn(config.noise, made, *tensor)


def _check_method(config: RunConfig) -> None:
    name, chosen = config.method, METHODS[config.method]
    made_by(name, chosen.load, Callable, "method: must be a zopro.choices.Method or a function")  # type: ignore[arg-type]
    if chosen.uses not in USES:
        rule = "must have uses FUNCTION_VALUES, SWEEP or BACK_PROPAGATION, of zopro.choices"
        raise InputError(f"method: {rule}, got {name!r} with uses {chosen.uses!r}.")
    if not hasattr(config, chosen.rate):
        raise InputError(f"method: its rate must be a key of the configuration, got {name!r} with rate {chosen.rate!r}.")
    if wrong := [*({*(chosen.heeds or ())} - {*GROUPS})]:
        raise InputError(f"method: its heeds must be of {', '.join(GROUPS)}, got {name!r} with heeds {wrong[0]!r}.")
    if chosen.preset not in ("", *PRESETS):
        rule = f"its preset must be of {', '.join(PRESETS)}"
        raise InputError(f"method: {rule}, got {name!r} with preset {chosen.preset!r}.")


def _check_drawn(name: str, made: Directions, parameter: str, like: torch.Tensor) -> None:
    rule = "noise: tensor(name, like, seed, step) must give a torch.Tensor"
    first, second = (made_by(name, lambda: made.tensor(parameter, like, 0, 0), torch.Tensor, rule) for _ in range(2))
    if (first.dtype, first.shape) != (torch.float32, like.shape):
        found = f"is of {first.dtype} and shape {tuple(first.shape)}, must be of float32 and like's {tuple(like.shape)}"
    elif not bool(first.isfinite().all()):
        found = "has entries that are not finite, must have none"
    elif first.data_ptr() == second.data_ptr():
        found = "is the same tensor at each call, must be a new one: steps scale it in place. Return z.clone()"
    elif made.pure and not torch.equal(first, second):
        found = "differs between two calls with the same arguments, must not. Draw by tensor_generator"
    else:
        return
    raise InputError(f"noise: the tensor of {name!r} {found}.")

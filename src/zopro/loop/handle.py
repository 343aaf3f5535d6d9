"""A run from Python: begun by `zopro.run` or opened again by `zopro.load`, with its policy, answers and numbers at hand.

python -c "import zopro; print(zopro.load('RUN').generate(['How do I boil an egg?']))"
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from zopro.config import RunConfig
from zopro.config.reading import load_config
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.beforehand import check_beforehand, own_folder
from zopro.loop.finished import kept_policy
from zopro.loop.voices import NAMES, Messages, Voices, manner_of
from zopro.store.durable import read_json
from zopro.store.layout import Layout
from zopro.store.rundir import read_metrics
from zopro.system.ranks import launched

_FLAG = re.compile(r"--(max-new-tokens|temperature|seed|iteration)\b")


class RunHandle:
    """A run directory with a finished policy. Files and models are read when they are first asked for.

    `path` is the run directory, `config` its `RunConfig`, `iteration` that of the policy.

    Raises:
        InputError: `path` is no run directory, or has no such policy.

    >>> run = zopro.load("runs/plain")
    >>> run.iteration, run.config.method
    (0, 'es')
    """

    def __init__(self, path: str | Path, iteration: int | None = None) -> None:
        try:
            found = kept_policy(path, iteration)
        except InputError as error:
            raise InputError(_in_python(error)) from None
        self.path, self.config, self.iteration = found.run, found.config, found.iteration
        self._voices = Voices(found, held=2)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: steps, evaluations and the ends of stages, in their order.

        >>> [line["iteration"] for line in zopro.load("runs/plain").metrics if "reward_low" in line]
        [None, 0]
        """
        return read_metrics(Layout(self.path).metrics())

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says of the whole run; empty while the run goes on.

        >>> sorted(zopro.load("runs/plain").summary)[:3]
        ['attempts', 'evaluations', 'exchanged_bytes_per_step']
        """
        path = Layout(self.path).summary()
        found: dict[str, Any] = read_json(path) if path.exists() else {}
        return found

    @property
    def policy(self) -> Any:
        """The policy in eval mode: a `peft.PeftModel`, or a transformers model where all parameters were trained.

        >>> type(zopro.load("runs/plain").policy).__name__
        'PeftModelForCausalLM'
        """
        return self._voices.whole("aligned")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, padding on the left."""
        return self._voices.tokenizer

    def generate(
        self,
        prompts: str | Messages | Sequence[str | Messages],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = 0.0,
        seed: int = 0,
        voice: str = "aligned",
    ) -> list[str]:
        """Answer each prompt, in the model's chat template.

        Args:
            prompts: texts, each a user's message, or conversations, each a list of messages with `role` and `content`;
                or one of either.
            max_new_tokens: of the longest answer; None: as in the run.
            temperature: 0 takes the likeliest token; None: as in the run.
            seed: of the sampling.
            voice: who answers: "aligned", "sft" or "base".

        Raises:
            InputError: prompts that are neither, a number out of range, or a conversation that the template or the model
                cannot take.

        >>> run = zopro.load("runs/plain")
        >>> len(run.generate(["What is tea?", "What is rust?"], max_new_tokens=4))
        2
        >>> talk = [{"role": "user", "content": "What is tea?"}]
        >>> run.generate([talk], max_new_tokens=4) == run.generate("What is tea?", max_new_tokens=4)
        True
        """
        if voice not in NAMES:
            raise InputError(f"voice: must be one of {', '.join(NAMES)}, got {voice!r}.")
        talks = _conversations(prompts)
        for name, value, kind in (("max_new_tokens", max_new_tokens, Integral), ("temperature", temperature, Real)):
            if value is not None:
                _check_number(name, value, kind)
        _check_number("seed", seed, Integral)
        manner = manner_of(self._voices.policy, max_new_tokens, temperature)
        try:
            return self._voices.answer(voice, talks, manner, seed)
        except InputError as error:  # the command's, in whose words the flags are
            raise InputError(_in_python(error)) from None

    def __repr__(self) -> str:
        return f"RunHandle({str(self.path)!r}, iteration={self.iteration})"


def _conversations(prompts: Any) -> list[Messages]:
    """Each prompt as messages. Raises `InputError` for what is neither texts nor conversations."""
    one = isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable)
    asked = [prompts] if one else list(prompts)
    if asked and all(isinstance(message, Mapping) for message in asked):
        asked = [asked]
    talks = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in asked]
    for talk in talks:
        if not (isinstance(talk, Sequence) and all(isinstance(turn, Mapping) and "role" in turn for turn in talk)):
            raise InputError(
                f"prompts: must be texts, or lists of messages with role and content, got {talk!r:.60}. Give a "
                "text, or a list of texts."
            )
    return talks


def _in_python(error: InputError) -> str:
    """What the command says, with its flags as arguments."""
    return _FLAG.sub(lambda flag: flag[1].replace("-", "_"), str(error))


def _check_number(name: str, value: Any, kind: type) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        rule = "a whole number" if kind is Integral else "a number"
        raise InputError(f"{name}: must be {rule}, got {value!r}.")


def load(run: str | Path, iteration: int | None = None) -> RunHandle:
    """Open a run directory, of the command or of `zopro.run`, with the policy of `iteration` (default: the newest).

    Raises:
        InputError: `run` is no run directory, or has no such policy.

    >>> zopro.load("runs/plain")
    RunHandle('runs/plain', iteration=0)
    """
    return RunHandle(run, iteration)


def run(
    config: RunConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    resume: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> RunHandle:
    """Run the whole loop, as `zopro run` does, and return it opened at its last policy.

    Args:
        config: the keys of docs/configuration.md, as a dict, as a YAML file or as a `RunConfig`.
        resume: continue the run in `output_dir` where it stopped; a finished one is opened as it is.
        quiet: no progress on stderr.
        overrides: keys that win over those of `config`.

    Raises:
        InputError: something in the configuration, the data or the run directory does not fit, and nothing was written;
            or a reward or judge of yours failed, or a training diverged, and what is finished is kept.
        zopro.errors.Stopped: the disk is full, or another process has crashed. The run can be resumed.

    >>> settings = {"model": "HuggingFaceTB/SmolLM2-135M-Instruct", "task": "verifiable", "train_data": "rows.jsonl"}
    >>> settings |= {"reward": "length:1-8", "method": "es", "population": 2, "iterations": 1, "policy_steps": 1}
    >>> settings |= {"eval_prompts": 2, "eval_samples": 1, "max_completion_length": 8, "output_dir": "runs/plain"}
    >>> run = zopro.run(settings, quiet=True, resume=True)  # the same line continues it, wherever it was stopped
    >>> len(run.generate(["What is tea?"]))
    1
    """
    given = dict(overrides)
    if isinstance(config, RunConfig):
        settings = RunConfig.from_dict(config.to_dict() | given)
    elif isinstance(config, Mapping):
        settings = RunConfig.from_dict({**config, **given})
    else:
        settings = load_config(Path(config), {**(own_folder(config) if resume else {}), **given})
    if not settings.output_dir and launched() > 1:
        raise InputError("output_dir: must be given where several processes share a run, got nothing. Name a folder.")
    if resume and not settings.output_dir:
        raise InputError("output_dir: must be given to resume a run, got none. Name its folder, or give RUN/config.yaml.")
    check_beforehand(settings, resume)
    summary = pipeline.run(settings, resume=resume, quiet=quiet)
    return load(summary.get("run", settings.output_dir))

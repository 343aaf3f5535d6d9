"""How a run's numbers are named and rounded wherever they are shown: terminal, report and comparison.

Two quantities share the letters KL. `kl_per_answer` is KL(policy || SFT) of a whole answer, as evaluations and
comparisons have it; `kl_per_token` is the mean over tokens that TRL logs at every step of a policy. Earlier versions
wrote `kl` for both.

    shown.interval({"reward": 1.5, "reward_low": 1.0, "reward_high": 2.0}, "reward")    # "1.500 [1.000, 2.000]"
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

PER_ANSWER, PER_TOKEN = "kl_per_answer", "kl_per_token"
MISSING = "-"
REMEMBERED = "remembered"
"""The key of an evaluation under which easy questions are (`zopro.loop.remembered`)."""
ELSEWHERE = "other_kl_per_answer"
"""The key of an evaluation for KL on prompts of another task (`other_data`), with `_low`, `_high` and `other_n`."""
FILES = (".jsonl", ".json", ".csv", ".parquet", ".gz")
"""How names of files with rows end."""
NAMED_QUESTIONS = 5  # at most, of those that were forgotten


class Start(NamedTuple):
    """What a run calls the policy that iteration 0 begins with: alone, and after "against" or "to"."""

    name: str
    the: str


def start(sft_steps: object) -> Start:
    """SFT where there were such steps. Without them that policy is the base model, and "SFT" would be untrue.

    >>> start(40), start(0), start(None).name
    (Start(name='SFT', the='SFT'), Start(name='start', the='the start'), 'SFT')
    """
    trained = not isinstance(sft_steps, int) or sft_steps > 0
    return Start("SFT", "SFT") if trained else Start("start", "the start")


def policy(iteration: int | None, start: Start) -> str:
    """The policy after an iteration; None is what iteration 0 begins with."""
    return start.name if iteration is None else f"iteration {iteration}"


def stage(name: str, start: Start) -> str:
    """A stage by its name; supervised fine-tuning without a step only writes the start down."""
    return start.name if name == "sft" and start.name != "SFT" else name


def place(name: str) -> str:
    """A name in which a path of a machine has only its last part, and which leaves out a server's address.

    A path may be of another folder or machine, so one is known by its form too: `a/b` alone may be the Hub's.

    >>> place("model:/home/me/judge"), place("vllm:http://10.0.0.1:8000"), place("me/base"), place("data/me/rows")
    ('model:judge', 'vllm', 'me/base', 'rows')
    """
    if "://" in name:
        return name.partition(":")[0]
    before, colon, rest = name.rpartition(":")
    path = Path(rest)
    formed = rest.startswith(("/", "./", "../")) or rest.endswith(FILES) or (rest.count("/") > 1 and before != "openai")
    return f"{before}{colon}{path.name}" if formed or (rest and os.path.exists(rest)) else name


def named(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl, or a point of a curve, with the names of today; other lines come back as they are.

    >>> named({"stage": "policy", "kl": 0.01})
    {'stage': 'policy', 'kl_per_token': 0.01}
    """
    name = PER_TOKEN if line.get("stage") == "policy" else PER_ANSWER
    return {name if key == "kl" else key: value for key, value in line.items()}


def fixed(value: Any, digits: int) -> str:
    """A number with so many digits after the point, never "-0.00"; a dash for what is missing or not finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        return MISSING
    return f"{round(value, digits) + 0.0:.{digits}f}"


def several(count: object, thing: str) -> str:
    """A number of things.

    >>> several(1, "prompt"), several(0, "prompt"), several(2.5, "minute")
    ('1 prompt', '0 prompts', '2.5 minutes')
    """
    number = f"{count:g}" if isinstance(count, float) else str(count)
    return f"{number} {thing}{'s' if number != '1' else ''}"


def judge(name: str, task: str) -> str:
    """Who decides between answers, named.

    >>> judge("auto", "chat"), judge("model:/home/me/judge", "chat")
    ('the judge of task chat', 'the judge model:judge')
    """
    return f"the judge of task {task}" if name == "auto" else f"the judge {place(name)}"


def reward(value: Any) -> str:
    return fixed(value, 3)


def share(value: Any) -> str:
    """Win rates and accuracies, in [0, 1]."""
    return fixed(value, 3)


def metric(value: Any) -> str:
    """Of a task, against the references, in [0, 100]."""
    return fixed(value, 1)


def kl(value: Any) -> str:
    """In nats."""
    return fixed(value, 2)


def signal(value: Any) -> str:
    """Of a difference over its rounding noise."""
    return fixed(value, 1)


def seconds(value: Any) -> str:
    return fixed(value, 1)


def megabytes(value: Any) -> str:
    """Of 1e6 bytes."""
    return fixed(value, 0)


def count(value: Any) -> str:
    """A number of things; a mean of such numbers has a digit after the point.

    >>> count(92.0), count(91.5)
    ('92', '91.5')
    """
    return fixed(value, 0 if not isinstance(value, float) or value.is_integer() else 1)


def bounds(line: Mapping[str, Any], name: str) -> str:
    """The 95 % interval of a reward or a share."""
    low, high = (fixed(line.get(f"{name}_{edge}"), 3) for edge in ("low", "high"))
    return MISSING if MISSING in (low, high) else f"[{low}, {high}]"


def interval(line: Mapping[str, Any], name: str) -> str:
    """A reward or a share with its interval."""
    value, edges = fixed(line.get(name), 3), bounds(line, name)
    return value if edges == MISSING else f"{value} {edges}"


def quality(numbers: Mapping[str, Any]) -> str:
    """What a reward model is worth on held-out rows: "accuracy 0.905, n 200"."""
    texts = [f"{name} {value if name == 'n' else share(value)}" for name, value in numbers.items()]
    return ", ".join(texts) or "not measured"


def held_out(numbers: Mapping[str, Any]) -> str:
    """The same with its rows.

    >>> held_out({"accuracy": 0.905, "n": 200})
    'accuracy 0.905 on 200 held-out rows'
    """
    values = {name: value for name, value in numbers.items() if name != "n"}
    return f"{quality(values)} on {several(numbers.get('n', 'some'), 'held-out row')}" if values else quality(values)


def remembered(record: Mapping[str, Any]) -> str:
    """What a record says in words: "forgotten: 1 of the 4 it knew (What is 2 + 2?)"; of many the first, and the share."""
    known, forgotten = record["known_before"], record["forgotten"]
    said = f"{forgotten or 'none'} of the {several(known, 'easy question')} it knew"
    if forgotten:
        lost = [answer["question"] for answer in record["answers"] if answer["right_before"] and not answer["right"]]
        rest = f" and {len(lost) - NAMED_QUESTIONS} more" if len(lost) > NAMED_QUESTIONS else ""
        said += f" ({' '.join(lost[:NAMED_QUESTIONS])}{rest})"
    if record["of"] > NAMED_QUESTIONS:
        said += f", kept {interval(record, 'kept')}"
    return f"forgotten: {said}"


def elsewhere(line: Mapping[str, Any]) -> str:
    """KL on prompts of another task: "on 40 prompts of another task: KL 1.20 [0.90, 1.50]"; empty where not measured."""
    if line.get(ELSEWHERE) is None:
        return ""
    return f"on {several(line['other_n'], 'prompt')} of another task: KL {kl_interval(line, ELSEWHERE)}"


def kl_interval(line: Mapping[str, Any], name: str) -> str:
    """KL with its 95 % interval."""
    value, low, high = (kl(line.get(f"{name}{edge}")) for edge in ("", "_low", "_high"))
    return value if MISSING in (low, high) else f"{value} [{low}, {high}]"

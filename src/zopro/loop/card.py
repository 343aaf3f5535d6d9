"""The model card of an exported policy: what it was trained on, how, what it gained and what it forgot.

Every number is read from the run directory; nothing is measured here, and no path of the machine is written.

    python -c "from zopro.loop import card, finished; print(card.card(finished.find_policy('RUN'), 'me/base'))"
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from zopro import __version__
from zopro.choices import BACK_PROPAGATION, FUNCTION_VALUES, METHODS
from zopro.config import RunConfig
from zopro.config.defaults import default_of
from zopro.loop.finished import Policy
from zopro.store import shown
from zopro.store.durable import read_json
from zopro.store.layout import Layout
from zopro.store.rundir import FREE, read_metrics

CARD, PICTURE = "README.md", "report.png"
_CURVE = "held-out-reward-95-interval.png"  # of a run's figures, where an earlier version drew no picture

Line = Mapping[str, Any]


def write_card(policy: Policy, base: str, folder: Path, adapter: bool = True, peft: bool = True) -> None:
    """Write the card, and the report's picture if there is one, to `folder`. Others as in `card`."""
    run = Layout(policy.run)
    picture = next((path for path in (run.share(), run.figures() / _CURVE) if path.is_file()), None)
    if picture is not None:
        shutil.copyfile(picture, folder / PICTURE)
    (folder / CARD).write_text(card(policy, base, adapter, picture is not None, peft), "utf-8")


def card(policy: Policy, base: str, adapter: bool = True, picture: bool = False, peft: bool = True) -> str:
    """The card as Markdown with the Hub's metadata before it. `base` is the model under the policy. `peft`: an adapter
    has the names that PEFT looks for; else it is for llama.cpp alone."""
    run, config = Layout(policy.run), policy.config
    stages = [*_stages(policy, read_metrics(run.metrics()))]
    summary = read_json(run.summary()) if run.summary().exists() else {}
    kind = "LoRA adapter over" if adapter else "version of"
    made = read_json(run.environment()).get("packages", {}) if run.environment().exists() else {}
    version = made.get("zopro", __version__)
    home = f"[{base}](https://huggingface.co/{base})" if _on_hub(base) else f"`{shown.place(base)}`"
    parts = [
        f"---\n{_metadata(policy, base, adapter)}\n---",
        f"# {shown.place(base)}, aligned by {config.method_of(policy.iteration)}",
        f"A {kind} {home}, made by zopro {version} (iteration {policy.iteration} of the run).",
        *(["![The run in one picture](" + PICTURE + ")"] if picture else []),
        "## What it was trained on",
        f"Rows of `{shown.place(config.train_data)}`, as task {config.task}. {_wanted(policy, summary)}",
        "## How",
        _table([("stage", "steps", "what it uses"), *stages]),
        _honestly(stages),
        "## What it gained",
        *_gains(policy, run),
        "## What it forgot",
        _forgotten(_evaluation(run, policy.iteration)),
        "## Use",
        _use(config.dtype, adapter) if peft else _use_of_llamacpp(),
        "## Settings",
        "Keys of the run's configuration that are not the defaults:",
        _settings(config),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(policy: Policy, base: str, adapter: bool) -> str:
    """The Hub's own keys; a base or rows that are only on this machine are left out."""
    config = policy.config
    methods = [config.method_of(iteration) for iteration in range(policy.iteration + 1)]
    tags = ["zopro", methods[-1], "preference-optimization", *(["lora"] if adapter else [])]
    tags += ["zeroth-order"] if any(METHODS[name].zeroth_order for name in methods) else []
    data = ModelCardData(
        base_model=base if _on_hub(base) else None,
        datasets=[config.train_data.partition(":")[0]] if _on_hub(config.train_data.partition(":")[0]) else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return str(data.to_yaml())


def _on_hub(name: str) -> bool:
    """Whether a name is one of the Hub, OWNER/NAME, and no file or folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists() and not name.endswith(shown.FILES)


def _rewards(config: RunConfig) -> list[str]:
    return [shown.place(name) if name.startswith("model:") else name for name in config.reward]


def _wanted(policy: Policy, summary: Line) -> str:
    config = policy.config
    if config.reward == ["model"] and config.weights == [1.0]:
        known = shown.quality(summary.get("reward_quality", {}))
        judge = f"pairs that {shown.judge(config.judge, config.task)} decided"
        refined = f", and refined after each iteration before this one on {judge}" if policy.iteration else ""
        trained = f"trained on their preferences (on held-out rows: {known})"
        return f"It was optimised for a reward model that was {trained}{refined}."
    if config.weights == [1.0]:
        return f"It was optimised for the reward `{_rewards(config)[0]}`."
    parts = [f"`{name}` x {weight:g}" for name, weight in zip(_rewards(config), config.weights, strict=True)]
    return f"It was optimised for {' + '.join(parts)}."


def _stages(policy: Policy, metrics: Sequence[Line]) -> Iterator[tuple[str, str, str]]:
    """Each training up to the policy: its name, steps, and what it uses."""
    for stage, iteration in _trained(policy, metrics):
        method = METHODS[policy.config.method_of(iteration)] if stage == "policy" and iteration is not None else None
        name = {"sft": "supervised fine-tuning", "reward": "reward model", "refine": "reward model, refined"}.get(stage)
        at = "" if iteration is None else f", iteration {iteration}"
        steps = [x["step"] for x in metrics if (x["stage"], x["iteration"]) == (stage, iteration) and x.get("step")]
        what = f"{name}{at}" if method is None else f"policy{at}: {method.name}"
        yield what, str(max(steps)), BACK_PROPAGATION if method is None else method.uses


def _trained(policy: Policy, metrics: Sequence[Line]) -> list[tuple[str, int | None]]:
    """Stages that took steps, in their order."""
    found: dict[tuple[str, int | None], None] = {}
    for line in metrics:
        stage, iteration = line["stage"], line["iteration"]
        before = iteration is None or iteration < policy.iteration + (stage == "policy")
        if line.get("step") and before and stage in ("sft", "reward", "policy", "refine"):
            found[stage, iteration] = None
    return list(found)


def _honestly(stages: Sequence[tuple[str, str, str]]) -> str:
    """Which of the stages back-propagate, in one sentence."""
    if not stages:
        return "The run has no record of its stages."
    back = [what for what, _, used in stages if used != FUNCTION_VALUES]
    if not back:
        return "No stage back-propagates: everything was done by function values."
    if len(back) == len(stages):
        return "All of these back-propagate."
    return f"These back-propagate: {'; '.join(back)}. The others use function values only."


def _gains(policy: Policy, run: Layout) -> Iterator[str]:
    lines = [line for i in (None, *range(policy.iteration + 1)) if (line := _evaluation(run, i))]
    if not lines:
        yield "Not measured."
        return
    start = shown.start(policy.config.sft_steps)
    checked = any(line.get("accuracy") is not None for line in lines)
    head = ("policy", "reward [95 %]", *(["accuracy [95 %]"] if checked else []), f"wins against {start.the} [95 %]")
    rows = [
        (
            f"before ({start.name})" if line.get("iteration") is None else f"iteration {line['iteration']}",
            shown.interval(line, "reward"),
            *([shown.interval(line, "accuracy")] if checked else []),
            shown.interval(line, "win_rate"),
            shown.kl(line.get(shown.PER_ANSWER)),
        )
        for line in lines
    ]
    yield _table([(*head, f"KL to {start.the}, nats an answer"), *rows])
    judged = f"Wins are by {shown.judge(policy.config.judge, policy.config.task)}."
    judge = judged if policy.config.trains_reward else "The higher reward wins."
    last = lines[-1]
    gained = [
        f"{name.replace('_', ' ')} {shown.interval(last, f'{name}_gain')}"
        for name in ("reward", "accuracy")
        if last.get(f"{name}_gain") is not None
    ]
    paired = f" Gained, paired by prompt: {', '.join(gained)}." if gained else ""
    prompts = last.get("prompts", last["n"])
    rewarded = f", {last['n']} of them with a reward" if last["n"] < prompts else ""
    yield f"On {prompts} held-out prompts{rewarded}. {judge}{paired}"


def _forgotten(line: Line) -> str:
    """What easy questions show, which the run asks before and after, and prompts of another task."""
    record = line.get(shown.REMEMBERED) or {"answers": []}
    told = [shown.elsewhere(line), shown.remembered(record) if record["answers"] else ""]
    lost = [f"- {x['question']} Now: {x['answer']}" for x in record["answers"] if x["right_before"] and not x["right"]]
    said = " ".join(f"{text[0].upper()}{text[1:]}." for text in told if text)
    return "\n".join([said or "Not measured.", *(["", *lost] if lost else [])])


def _evaluation(run: Layout, iteration: int | None) -> dict[str, Any]:
    path = run.evaluation(iteration, ".json")
    return shown.named(read_json(path)) if path.exists() else {}


def _use(dtype: str, adapter: bool) -> str:
    """How to load it; an adapter says nothing of the dtype that its base was in, and a model is stored in its own."""
    library, loader = ("peft", "AutoPeftModelForCausalLM") if adapter else ("transformers", "AutoModelForCausalLM")
    known, note = ("float32", '  # or "bfloat16", if the run computed in it') if dtype == "auto" else (dtype, "")
    more, note = (f', dtype="{known}"', note) if adapter else ("", "")
    return (
        f"```python\nfrom {library} import {loader}\nfrom transformers import AutoTokenizer\n\n"
        'folder = "."  # this folder, or its name on the Hub\n'
        f"model = {loader}.from_pretrained(folder{more}){note}\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n```"
    )


def _use_of_llamacpp() -> str:
    return (
        "With llama.cpp alone, as the file that `zopro export RUN --out DIR --gguf` writes. The names that the adapter's "
        "modules have in transformers are not known to zopro, so PEFT would leave them out.\n\n"
        "```\nllama-cli -m model.gguf --lora adapter.gguf\n```"
    )


def _settings(config: RunConfig) -> str:
    """As YAML, without the keys that say where and how work is done; places have their last part alone."""
    kept: dict[str, Any] = {}
    for key in fields(config):
        value = getattr(config, key.name)
        if key.name not in FREE and value != default_of(key, config.task, config.engine):
            kept[key.name] = shown.place(value) if isinstance(value, str) else value
    if "reward" in kept:
        kept["reward"] = _rewards(config)
    return f"```yaml\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}```"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))

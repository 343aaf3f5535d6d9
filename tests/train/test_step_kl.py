"""How far a step moves the policy, as its own evaluations say: beside what the step has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tiny_trainers import lines, with_adapter, zopro
from zopro.engine import Batch
from zopro.train.guided import GuidedSPSATrainer
from zopro.train.step_kl import slopes_along
from zopro.zo import Displacement


class Changed(TrainerCallback):
    """Half the mean square by which each step changes the log-probs of its own answers."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.estimate, self.seen, self.found = trainer, trainer._estimate, [], []
        trainer._estimate = self.see
        trainer.add_callback(self)

    def see(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((Batch.of_inputs(inputs), inputs["old_logps"]))
        return self.estimate(model, inputs, *args, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        squares = []
        for batch, before in self.seen:
            after = batch.sums(self.trainer.engine.logprobs(batch, temperature=self.trainer.temperature)[0])
            squares.append(float((after.detach() - before).square().mean()))
        self.found.append(sum(squares) / len(squares) / 2)
        self.seen.clear()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
        {"evaluation": "batched"},
        {"second_moment_beta": 0.0, "learning_rate": 1e-4},
        {"queries": 3},
        {"queries": 3, "previous_update": "shared"},
    ],
    ids=str,
)
def test_it_is_half_the_mean_square_by_which_the_answers_log_probs_change(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = with_adapter()
    if "previous_update" in options:  # which all directions of a step have nearly nothing but
        generator = torch.Generator().manual_seed(0)
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        drawn = {name: torch.randn(weight.shape, generator=generator) for name, weight in trained}
        options = {**options, "previous_update": drawn}
    trainer = zopro(tmp_path, **{"model": model, "max_steps": 2, "eps": 1e-3, "learning_rate": 5e-4, **options})
    changed = Changed(trainer)
    trainer.train()
    told = [line["step_kl"] for line in lines(trainer)]
    assert told == pytest.approx(changed.found, rel=0.05)  # log-probs that change by 1e-5 are known to so much
    assert all(0 < kl < 0.01 for kl in told)


def test_one_side_of_many_queries_says_what_two_sides_of_each_say() -> None:
    """Answers' slopes along 200 independent z, and a bend that all of them share."""
    slopes = torch.randn(200, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at = [Displacement(seed=0, query=query, step=0, t=1.0, eps=(0.1,)) for query in range(200)]
    plus, minus = (list(-20 + side * 0.1 * slopes - 3 * 0.01) for side in (1, -1))
    two = slopes_along([*at, *(there.mirrored for there in at)], [*plus, *minus])
    one = slopes_along(at, plus)
    assert two is not None and one is not None and two.numpy() == pytest.approx(slopes.numpy(), rel=1e-3, abs=1e-4)
    assert float(one.square().mean()) == pytest.approx(float(two.square().mean()), rel=0.02)


def test_calibration_and_single_evaluations_say_nothing() -> None:
    one = Displacement(seed=0, query=0, step=0, t=1.0, eps=(0.5,))
    rows = [torch.tensor([-1.0, -2.0])] * 2
    assert slopes_along([one], rows[:1]) is None and slopes_along([], []) is None
    theta = Displacement(seed=0, query=0, step=0, t=0.0, eps=(0.5,))
    assert slopes_along([theta, one], rows) is None, "L(theta) is the rollout's, rounded otherwise"


def test_one_sided_steps_along_what_all_directions_share_say_nothing(tmp_path: Path) -> None:
    """The differences among queries, which stand for slopes there, have lost it."""
    assert GuidedSPSATrainer.z_alike is True
    generator, model = torch.Generator().manual_seed(0), with_adapter()
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    along = {name: torch.randn(weight.shape, generator=generator) for name, weight in trained}
    for update, said in ((None, True), (along, False)):
        options = {"model": with_adapter(), "max_steps": 1, "eps": 1e-3, "sides": 1, "queries": 3}
        trainer = zopro(tmp_path / str(said), **options, previous_update=update)
        trainer.train()
        assert ("step_kl" in lines(trainer)[0]) is said

"""Online DPO on the engine: RLOO's rollouts and rewards, the best against the worst of each prompt's K completions.

The rest of TRL's loop is RLOO's, so that a comparison with it differs in the loss alone (`zopro.train.objectives`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from trl import RLOOConfig

from zopro.engine import Batch
from zopro.train.objectives import online_dpo_loss
from zopro.train.papers import ONLINE_DPO
from zopro.train.rloo import EngineRLOOTrainer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zopro.train.typed import RLOOArguments


class OnlineDPOTrainer(EngineRLOOTrainer):
    """First-order online DPO (Guo et al. 2024, arXiv 2402.04792); `beta` weights the log-ratios of its loss.

    Arguments are those of `EngineRLOOTrainer` with a `trl.RLOOConfig`, whose `beta` is DPO's here: no divergence is taken
    off the rewards, the reference policy is in the loss. A step's
    completions must be one batch, since the two of a pair may be anywhere in it.

    Raises:
        ValueError: `beta` is 0, the steps are accumulated, or there is more than one process.
    """

    _name, _paper = "Online DPO", ONLINE_DPO
    _tag_names: ClassVar[list[str]] = ["trl", "zopro", "online-dpo"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: RLOOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Unpack[RLOOArguments],
    ) -> None:
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        if not self.args.beta > 0:
            raise ValueError(f"beta: must be greater than 0 for online DPO's reference policy, got {self.args.beta}")
        if self.args.steps_per_generation != 1 or self.accelerator.num_processes > 1:
            raise ValueError(
                "gradient_accumulation_steps: must be 1, with steps_per_generation=1 and one process, for online DPO: "
                f"both completions of a pair are in one batch, got {self.args.gradient_accumulation_steps}"
            )
        self._scores: Tensor | None = None
        self._reference_logprobs: Tensor | None = None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        scores = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._scores = scores.masked_fill(rewards.isnan().all(1), torch.nan)  # no reward is none of 0
        return rewards

    def _logprobs(self, model: Any, batch: Batch) -> Tensor:
        logprobs = super()._logprobs(model, batch)
        if not torch.is_grad_enabled():  # the reference's is the last such pass before the batch is complete
            self._reference_logprobs = logprobs
        return logprobs

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._reference_logprobs = self._scores = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._reference_logprobs is None or self._scores is None:
            raise ValueError("reference: online DPO needs log-probs of a reference policy, and this model gave none")
        batch["reference_logps"] = (self._reference_logprobs * batch["completion_mask"]).sum(1)
        batch["scores"] = self._scores
        batch["place"] = torch.arange(len(self._scores), device=self._scores.device)  # the batch is shuffled before use
        return batch

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        batch = Batch.of_inputs(inputs)
        tokens = self._get_per_token_logps_and_entropies(model, *batch)[0]
        order = torch.argsort(inputs["place"])
        generations = self.num_generations if self.model.training else self.num_generations_eval
        loss = online_dpo_loss(
            batch.sums(tokens)[order],
            inputs["reference_logps"][order],
            inputs["scores"][order],
            generations,
            self.args.beta,
        )
        return loss

"""TRL's RLOOTrainer on our engine: rollouts that prefill each prompt once, log-probs without a full logits tensor.

Nothing of TRL's loop is copied: two hooks are overridden, generation and log-probs. First-order (`method: rloo`, the
warm start) and zeroth-order training (`ZOPrOTrainer`) share this class, so that comparisons between them are fair.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import gather
from torch import Tensor
from torch.utils.data import Sampler
from trl import RLOOConfig, RLOOTrainer

from zopro.config.policy import ADVANTAGES
from zopro.engine import Batch, Engine, Rollouts, Sampling
from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.engine import LocalEngine, by_prompt
from zopro.engine.local.quantised import trained_tensors, undo_rounding
from zopro.engine.opening import served
from zopro.errors import InputError
from zopro.system.clock import Clock, timed
from zopro.system.guard import checked_reward
from zopro.system.heap import expect_graph
from zopro.text.frame import check_embedded
from zopro.train.arguments import check_enough, on_one_gpu
from zopro.train.construction import (
    ADAPTER,
    arguments,
    check_model,
    check_rewards,
    check_weights,
    freeze_reference,
    named_apart,
    trainable,
)
from zopro.train.drawing import ROW, Drawn, RowSeeds, drawing
from zopro.train.epochs import CountedSteps, EpochSampler
from zopro.train.objectives import group_normalised_advantages
from zopro.train.resuming import Resuming
from zopro.train.rows import check_encoded, check_evaluated, check_trained
from zopro.zo.monitor import ResolutionMonitor

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zopro.train.typed import TRLArguments


class EngineRLOOTrainer(Resuming, RLOOTrainer):
    """`trl.RLOOTrainer` with the same arguments, generating and scoring through `zopro.engine`.

    Args:
        reference: name -> tensor, adapter weights of the reference policy (the SFT adapter in the iterated loop). By
            default the weights that training starts from, as in TRL.
        advantage: "rloo", a reward less the mean of its siblings', or "grpo", that normalised over its group.
        reward_timeout: seconds that one call of a reward function may take; 0: no limit (see `zopro.system.guard.call`).

    Departures from TRL: in float32 old log-probs come with the rollout instead of another forward pass (on-policy they
    are the same numbers), and the entropy, which nothing uses, is logged as missing. vLLM (`use_vllm=True`), continuous
    batching, images and mixture-of-experts losses take TRL's own path.

    Raises:
        InputError: `args` of another trainer, or with `torch_compile`; a model that cannot be trained
            (`zopro.train.construction`); rewards that are none; a repetition penalty, or `generation_kwargs` that the
            engine does not draw by (`zopro.train.drawing`); a pad token without an embedding. While training, rows
            without a prompt, or too few; a checkpoint of another training; weights that diverge; a tokenizer that ends
            every prompt with EOS; a reward function that raises, is late, or does not return one finite number (or None,
            which TRL leaves out) for each completion.
        ValueError: `reference` without an adapter of the same names and shapes to hold it; an unknown `advantage`.
    """

    config_cls: ClassVar[type] = RLOOConfig
    clock: Clock | None = None  # is told how long rollout, scoring, log-probs and loss take
    reward_funcs: list[Any]
    reward_func_names: list[str]
    _current_train_step_time: float
    _parts = 1  # into which a step's rows are cut before they are answered

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: RLOOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        reference: Mapping[str, Tensor] | None = None,
        advantage: str = "rloo",
        reward_timeout: float = 0.0,
        **kwargs: Unpack[TRLArguments],
    ) -> None:
        if advantage not in ADVANTAGES:
            raise ValueError(f"advantage: must be one of {', '.join(ADVANTAGES)}, got {advantage!r}")
        args = on_one_gpu(arguments(args, self.config_cls))
        if args.torch_compile:
            raise InputError("torch_compile: must be off, since the engine runs the passes, got True. Leave it out.")
        check_model(model, args.beta, processing_class, kwargs.get("peft_config"))
        if not (args.use_vllm or args.use_transformers_continuous_batching):
            drawing(args)
        reward_funcs = check_rewards(reward_funcs, kwargs.get("reward_processing_classes"), reward_timeout)
        given = trained_tensors(model)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        undo_rounding(self.model, given)
        trainable(self.model)
        self.reward_funcs = [
            function if isinstance(function, torch.nn.Module) else checked_reward(function, reward_timeout)
            for function in self.reward_funcs
        ]
        self.reward_func_names = named_apart(self.reward_func_names)
        self.advantage = advantage
        check_embedded(self._tokenizer, self.model, "the pad token", [self._tokenizer.pad_token_id])
        self._unscored = torch.zeros(0, dtype=torch.bool)
        self._rollout: Rollouts | None = None
        self.last_batch: Drawn | None = None
        self.order: EpochSampler | None = None
        self.row_seeds = RowSeeds()
        self.add_callback(CountedSteps(self))
        freeze_reference(self.model, reference, self.args.beta)
        policy = self.accelerator.unwrap_model(self.model)
        self.engine: Engine = served(policy) or LocalEngine(policy, autocast=self.accelerator.autocast)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with a warning where Adam's steps, as long as the learning rate, are lost in 16 bits."""
        optimizer, rate, monitor = super().create_optimizer(*args, **kwargs), self.args.learning_rate, ResolutionMonitor()
        monitor.begin(0)
        for parameter in self.model.parameters() if isinstance(optimizer, torch.optim.Adam) else ():
            if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
                monitor.see(parameter.detach(), parameter.detach().float() + rate)
        monitor.end(0, rate)
        return optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training. Raises InputError: `check_trained`, and for a stream that ends before its first step."""
        check_trained(self.train_dataset, self.eval_dataset, self.args)
        result = super().train(*args, **kwargs)
        if self.state.global_step == 0 < self.state.max_steps and not hasattr(self.train_dataset, "__len__"):
            check_enough(0, self.args, "a shorter stream")
        self._check_weights()
        return result

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. Raises InputError: `check_evaluated`."""
        check_evaluated(self.eval_dataset if eval_dataset is None else eval_dataset, self.eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. Answers and numbers are those of its rows alone, whatever was evaluated before."""
        self.row_seeds.begin("eval")
        self._metrics["eval"].clear()  # a prediction logs nothing, and leaves its own
        return super().evaluation_loop(*args, **kwargs)

    def _check_weights(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        check_weights(parameters, self.args.learning_rate, self.state.global_step)

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        self.order = EpochSampler(super()._get_train_sampler(dataset), self.args.seed)
        return self.order

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        for parameter in frozen:  # PEFT unfreezes the adapter it goes back to after the reference policy's
            parameter.requires_grad_(False)
        if self.advantage == "grpo":
            output["advantages"] = self._group_normalised(output["advantages"])
        mode = "train" if self.model.training else "eval"
        self._note_drawn(self._metrics[mode]["reward"][-1], inputs)
        return output

    def _note_drawn(self, reward: float, inputs: list[dict[str, Any]]) -> None:
        own = [example[ROW] for example in inputs if ROW in example]
        rows = self.accelerator.gather(torch.tensor(own, dtype=torch.int64, device=self.accelerator.device)).tolist()
        self.last_batch = Drawn(reward, list(dict.fromkeys(rows)))

    @timed("scoring")
    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)  # of all ranks
        self._unscored = rewards.isnan().all(1)
        return rewards

    def _group_normalised(self, leave_one_out: Tensor) -> Tensor:
        """GRPO's advantages from RLOO's: of n rewards, those are the centred ones times n / (n - 1)."""
        generations = self.num_generations if self.model.training else self.num_generations_eval
        if generations < 2:
            return leave_one_out
        everyone: Tensor = gather(leave_one_out)
        advantages = everyone.masked_fill(self._unscored, torch.nan).view(-1, generations)
        count = advantages.isfinite().sum(1, keepdim=True)
        centred = advantages * (count - 1) / count
        first = self.accelerator.process_index * len(leave_one_out)
        return group_normalised_advantages(centred.flatten(), generations)[first : first + len(leave_one_out)]

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        check_encoded(prompts[0], self._tokenizer, self.processing_class, self.chat_template_kwargs)
        return super()._tokenize_prompts(prompts)

    @timed("rollout")
    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, multimodal_fields: dict) -> list[list[int]]:
        self._check_weights()
        if self.use_vllm or self.use_transformers_continuous_batching or images or multimodal_fields:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields)
        prompts, copies, options = self._sampling(prompt_ids)
        rollout = self.engine.sample(prompts, copies, options)[0]
        self._rollout = rollout
        return rollout.answers()

    def _sampling(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], int, Sampling]:
        """What the engine is asked for: prompts, completions of each, and how they are drawn."""
        groups = [(prompt, len(list(copies))) for prompt, copies in groupby(prompt_ids)]
        copies = groups[0][1]
        if any(count != copies for _, count in groups):  # a rank's slice may cut a group
            groups, copies = [(prompt, 1) for prompt in prompt_ids], 1
        mode, parts = ("train", self._parts) if self.model.training else ("eval", 1)
        ranks = self.accelerator.process_index, self.accelerator.num_processes
        options = Sampling(
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self._tokenizer.pad_token_id,
            **drawing(self.args),
            generator=self.row_seeds.generators(prompt_ids, mode, self.args.seed, self.state.global_step, *ranks, parts),
        )
        return [prompt for prompt, _ in groups], copies, options

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        synchronised = self.accelerator.num_processes > 1 and torch.is_grad_enabled()  # needs DDP's own forward
        if synchronised and not abilities(causal_parts(self.accelerator.unwrap_model(model))).pads:
            name = type(self.accelerator.unwrap_model(model)).__name__
            raise InputError(
                f"model: {name} takes padding for text, and back-propagation in {self.accelerator.num_processes} "
                "processes pads. Use one process, or a zeroth-order method."
            )
        if synchronised or compute_aux_loss or any(value is not None for value in inputs.values()):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **inputs,
            )
        rollout, self._rollout = self._rollout, None
        if rollout is not None and self._drawn_from(model, rollout, input_ids[:, -logits_to_keep:]):
            logprobs = rollout.logprobs
        else:
            logprobs = self._logprobs(model, Batch(input_ids, attention_mask, logits_to_keep))
        entropy = torch.full_like(logprobs, torch.nan).detach() if compute_entropy else None
        return logprobs, entropy, None

    @timed("log-probs")
    def _logprobs(self, model: Any, batch: Batch) -> Tensor:
        """Log-probs [B, C] of any of TRL's policies; rows of the same prompt, which TRL has shuffled, share its pass."""
        with self.accelerator.autocast():
            return by_prompt(batch, partial(self._score, model))

    def _score(self, model: Any, batch: Batch, copies: int) -> Tensor:
        """Log-probs [B, C] of rows of which each `copies` share a prompt. What a guided trainer overrides."""
        expect_graph(torch.is_grad_enabled() and self.args.gradient_checkpointing)  # for memory, at the price of time
        policy = self.accelerator.unwrap_model(model)
        if engine := served(policy):
            return engine.logprobs(batch, temperature=self.temperature)[0]
        return LocalEngine(policy).score(batch, copies, self.temperature)

    def _takes_rollout_logprobs(self, model: Any) -> bool:
        """Whether the rollout's log-probs are near enough to a forward pass's to be the denominator of a ratio.

        In bfloat16 they are not: on a 270M model the log-probs of 32-token answers differed by 0.16 nats in the mean
        between decoding and one pass over the whole, next to RLOO's clip range of 0.2; in float32 by 1e-5.
        """
        return bool(model.dtype == torch.float32) and self.accelerator.mixed_precision == "no"

    def _drawn_from(self, model: Any, rollout: Rollouts, completion_ids: Tensor) -> bool:
        """Whether these are the completions just drawn from this policy, so that their log-probs are known."""
        unwrapped = self.accelerator.unwrap_model(model)
        active = getattr(unwrapped, "active_adapter", ADAPTER)
        same_shape = rollout.completion_ids.shape == completion_ids.shape
        same = active == ADAPTER and same_shape and bool((rollout.completion_ids == completion_ids).all())
        same = same and drawing(self.args)["temperature"] == self.temperature
        return same and self._takes_rollout_logprobs(unwrapped)

"""`RewardModel`: one adapter and its head, trained, called, saved and interpolated. See the package's docstring."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from zopro.engine.local.adapters import open_adapter
from zopro.engine.local.scores import can_share, pads_right, shared_scores
from zopro.errors import InputError
from zopro.rewards.correlations import correlations
from zopro.rewards.record import RECORD_FILE, read_record
from zopro.rewards.sequences import Pair, Scored, Sequences, different_scores
from zopro.rewards.training import fit_pairs, fit_scores, pad_right
from zopro.store.durable import whole_folder
from zopro.system import guard
from zopro.system.progress import counted
from zopro.system.random_state import preserve_random_state
from zopro.text.chat import check_end
from zopro.text.frame import Frame, check_embedded, declared_stops, frame_of
from zopro.weights.interpolation import State, check_same_tensors, interpolate, read_state
from zopro.weights.saving import check_whole, save_weights


class RewardModel:
    """A LoRA adapter and a linear head (num_labels = 1) over a base model; the reward is its value where a turn ends.

    `Sequences` says what it reads, in training and in scoring alike.

    Args:
        model: its active adapter is the reward model. The head is put in float32, and the padding token in the
            classifier's config is set to one that ends no answer: the classifier takes the last token that is not
            padding as a sequence's end, so where a tokenizer pads with EOS it would miss it.
        tokenizer: must have an EOS token.
        max_length: longest sequence in tokens, the answer's ending included.
        frame: what stands around an answer; by default what the tokenizer's chat template puts there, or without a
            template EOS after it.

    Attributes:
        offset: subtracted from the head's value by every scoring method; 0 unless `center` set it. It belongs to the
            weights it was measured on: training, interpolation and `set_state` put it back to 0.
        score_mean, score_std: of the rows of the first `train_scores`, whose reward's unit is (score - mean) / std.
    """

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, max_length: int, frame: Frame | None = None
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("tokenizer: must have an EOS token, which ends every answer, got none. Set eos_token.")
        if model.config.num_labels != 1:
            raise InputError(f"model: must have num_labels=1 (one reward), got {model.config.num_labels}.")
        if max_length < 3:
            raise InputError(f"max_length: must hold a prompt, an answer and EOS (3 tokens), got {max_length}.")
        self.model, self.tokenizer = model, tokenizer
        check_end(tokenizer, "tokenizer")
        self.sequences = Sequences(tokenizer, max_length, frame or frame_of(tokenizer, declared_stops(model)))
        self.offset = 0.0
        self.score_mean: float | None = None
        self.score_std: float | None = None
        stop, pad = self.sequences.frame.stop, tokenizer.pad_token_id
        self._pad = int(pad) if pad is not None and pad != stop else int(stop == 0)
        check_embedded(tokenizer, model, "padding and the token that ends an answer", [self._pad, stop])
        model.config.get_text_config().pad_token_id = self._pad
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                # In bfloat16 an AdamW step is smaller than the head's rounding, and close rewards become equal.
                head = module.modules_to_save[model.active_adapter].float()
                head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))

    # Training

    def train_pairs(
        self, pairs: Sequence[Pair], *, steps: int, batch_size: int, learning_rate: float, seed: int, **options: Any
    ) -> dict[str, float]:
        """Train with the pairwise loss -log sigmoid(r(chosen) - r(rejected)), by TRL's RewardTrainer.

        Options: `callbacks` (transformers callbacks), `output_dir` and `report_to` (as in transformers; by default
        nothing is written or reported), `checkpoint_steps` (see `zopro.train.checkpoints`). Pairs whose two sequences are
        equal (within max_length) teach nothing: they are dropped and counted. The global random state is left as it
        was. `steps=0` changes nothing.

        Returns:
            loss (mean over the steps), pairs (used), dropped, cut (sequences shortened to max_length).

        Raises:
            InputError: no pair is left, or a prompt fills max_length.
            Diverged: the loss or the trained weights are not finite.
        """
        chosen, chosen_cut = self.sequences.from_text([p.prompt for p in pairs], [p.chosen for p in pairs])
        rejected, rejected_cut = self.sequences.from_text([p.prompt for p in pairs], [p.rejected for p in pairs])
        kept = [i for i in range(len(pairs)) if chosen[i] != rejected[i]]
        if not kept:
            raise InputError(f"pairs: must hold at least one pair with two different answers, got {len(pairs)} pairs.")
        report = {"pairs": len(kept), "dropped": len(pairs) - len(kept), "cut": chosen_cut + rejected_cut}
        chosen, rejected = [chosen[i] for i in kept], [rejected[i] for i in kept]
        options |= {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
        return report | self._fit(lambda **o: fit_pairs(self.model, self.tokenizer, chosen, rejected, **o), options)

    def train_scores(
        self, rows: Sequence[Scored], *, steps: int, batch_size: int, learning_rate: float, seed: int, **options: Any
    ) -> dict[str, float]:
        """Train by least squares on standardised scores, (score - score_mean) / score_std. Options as `train_pairs`.

        Mean and standard deviation are those of the first call's rows and are kept by later calls and by `save`, so
        that a model's unit stays the same: a reward of 1 is one standard deviation above the average answer.

        Returns:
            loss (mean over the steps), rows, cut (sequences shortened to max_length).

        Raises:
            InputError: fewer than two different scores, a score that is not finite, or a prompt that fills max_length.
        """
        scores = different_scores(rows, "learn from")
        if self.score_mean is None or self.score_std is None:
            self.score_mean = math.fsum(scores) / len(scores)
            self.score_std = math.sqrt(math.fsum((s - self.score_mean) ** 2 for s in scores) / len(scores))
        targets = [(score - self.score_mean) / self.score_std for score in scores]
        sequences, cut = self.sequences.from_text([r.prompt for r in rows], [r.answer for r in rows])
        options |= {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
        report = {"rows": len(rows), "cut": cut}
        return report | self._fit(lambda **o: fit_scores(self.model, sequences, targets, **o), options)

    def _fit(self, fit: Callable[..., float], options: dict[str, Any]) -> dict[str, float]:
        if options["steps"] == 0:  # transformers would train for three epochs
            return {}
        self.offset = 0.0
        loss = fit(pad_id=self._pad, device=self._device, **options)
        check_whole(self.model)
        return {"loss": loss}

    # Scoring

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int = 32
    ) -> list[float]:
        """Rewards of token ids, in the order given. What follows a completion's first stop (padding) is left out.

        Where every prompt comes K times in a row, as in policy optimisation, it goes through the network once.

        Raises:
            InputError: the two differ in length, or a prompt fills max_length.
        """
        sequences = self.sequences.from_ids(prompts, completions)
        copies = {len(list(group)) for _, group in groupby(prompts)}
        if len(copies) == 1 and copies != {1} and can_share(self.model):
            return self._score_shared(prompts, sequences, copies.pop(), batch_size)
        return self._score(sequences, batch_size)

    def score_texts(self, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 32) -> list[float]:
        """Rewards of rendered prompts and answers, in the order given; errors as `score`."""
        return self._score(self.sequences.from_text(prompts, answers)[0], batch_size)

    def center(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], batch_size: int = 32
    ) -> float:
        """Set `offset` so that the mean reward of these answers (the SFT policy's, say) is zero; return it."""
        if not prompts:
            raise InputError("prompts: must hold at least one prompt to centre the reward on, got none.")
        rewards = self.score(prompts, completions, batch_size)
        self.offset += math.fsum(rewards) / len(rewards)
        return self.offset

    def accuracy(self, pairs: Sequence[Pair], batch_size: int = 32) -> dict[str, float]:
        """`accuracy`: share of pairs whose chosen answer has the higher reward (a tie counts half); `n`: pairs,
        without those with an answer that is cut to max_length. It is NaN where none is left."""
        if not pairs:
            raise InputError("pairs: must hold at least one pair to measure the accuracy on, got none.")
        pairs = [p for p in pairs if self.sequences.whole(p.prompt, p.chosen, p.rejected)]
        answers = [p.chosen for p in pairs] + [p.rejected for p in pairs]
        rewards = self.score_texts([p.prompt for p in pairs] * 2, answers, batch_size)
        margins = torch.tensor(rewards[: len(pairs)]) - torch.tensor(rewards[len(pairs) :])
        return {"accuracy": float((margins.sign() + 1).mean() / 2), "n": len(pairs)}

    def correlation(self, rows: Sequence[Scored], batch_size: int = 32) -> dict[str, float]:
        """`pearson` and `spearman` between reward and score over `n` rows, those whose answer is not cut to max_length.

        Raises:
            InputError: fewer than two different scores, or one that is not finite: no correlation is defined. (It is
                NaN where all rewards are equal, or fewer than two rows are left.)
        """
        different_scores(rows, "correlate")
        rows = [r for r in rows if self.sequences.whole(r.prompt, r.answer)]
        rewards = self.score_texts([r.prompt for r in rows], [r.answer for r in rows], batch_size)
        return correlations(rewards, [float(r.score) for r in rows])

    def as_reward_function(self, batch_size: int = 32) -> Callable[..., list[float]]:
        """A reward function as TRL calls it; it scores the sampled token ids, not the decoded text. Its prompts are
        rendered strings, tokenised as TRL's RLOOTrainer does."""

        def reward_model(
            prompts: list[str], completions: list[str], completion_ids: list[list[int]], **kwargs: Any
        ) -> list[float]:
            distinct = list(dict.fromkeys(prompts))  # K completions share a prompt
            ids = dict(zip(distinct, self.tokenizer(distinct)["input_ids"], strict=True))
            scores = self.score([ids[prompt] for prompt in prompts], completion_ids, batch_size)
            return guard.rewards(scores, len(completions), "reward model")

        reward_model.checked = True  # type: ignore[attr-defined]
        return reward_model

    def _score_shared(
        self, prompts: Sequence[Sequence[int]], sequences: list[list[int]], copies: int, batch_size: int
    ) -> list[float]:
        endings = [sequence[len(prompt) :] for prompt, sequence in zip(prompts, sequences, strict=True)]
        rewards = [0.0] * len(sequences)
        by_length = sorted(range(0, len(sequences), copies), key=lambda i: len(sequences[i]), reverse=True)
        size = max(1, batch_size // copies)
        for start in counted(range(0, len(by_length), size), "scoring"):
            rows = [i + k for i in by_length[start : start + size] for k in range(copies)]
            values = shared_scores(self.model, [prompts[i] for i in rows[::copies]], [endings[i] for i in rows], copies)
            for i, value in zip(rows, values.tolist(), strict=True):
                rewards[i] = value - self.offset
        return rewards

    @torch.no_grad()
    def _score(self, sequences: list[list[int]], batch_size: int) -> list[float]:
        rewards = [0.0] * len(sequences)
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]), reverse=True)
        was_training = self.model.training
        self.model.eval()
        try:
            size = batch_size if pads_right(self.model) else 1
            for start in counted(range(0, len(by_length), size), "scoring"):
                rows = by_length[start : start + size]
                batch = pad_right([sequences[i] for i in rows], self._pad)
                batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
                values: Tensor = self.model(**batch, use_cache=False).logits[:, 0]
                for i, value in zip(rows, values.float().tolist(), strict=True):
                    rewards[i] = value - self.offset
        finally:
            self.model.train(was_training)
        return rewards

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # State

    def state(self) -> dict[str, Tensor]:
        """A copy of the adapter's and the head's tensors, by the names `save` gives them."""
        return {name: tensor.detach().clone() for name, tensor in self._live().items()}

    def set_state(self, state: State | str | Path) -> None:
        """Put the tensors of `state` (or of a saved folder) in the live model; `InputError` names one that differs."""
        tensors = read_state(state)
        check_same_tensors(tensors, self._live(), "state")
        set_peft_model_state_dict(self.model, dict(tensors), adapter_name=self.model.active_adapter)
        self.offset = 0.0

    def interpolate_with(self, previous: State | str | Path, weight: float) -> None:
        """Replace the live weights by weight * live + (1 - weight) * previous: what is saved is what is used."""
        self.set_state(interpolate(previous, self._live(), weight))

    def _live(self) -> dict[str, Tensor]:
        adapter = self.model.active_adapter
        return get_peft_model_state_dict(self.model, adapter_name=adapter, save_embedding_layers=False)

    def save(self, folder: str | Path) -> None:
        """Write an ordinary PEFT adapter and reward.json, with the head; the folder appears whole or not at all.

        Raises `Diverged`: a tensor is not finite.
        """
        with whole_folder(Path(folder)) as partial:
            save_weights(self.model, partial)
            record: dict[str, float | None] = {"max_length": self.sequences.max_length, "offset": self.offset}
            record |= {"score_mean": self.score_mean, "score_std": self.score_std}
            (partial / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(
        cls, base_classifier: PreTrainedModel, folder: str | Path, tokenizer: Any, frame: Frame | None = None
    ) -> RewardModel:
        """A saved reward model, ready to score or to be trained on, over the classifier it was trained on.

        PEFT puts the adapter's layers inside `base_classifier`; to change a loaded model's weights use `restore`.
        """
        record = read_record(folder)
        with preserve_random_state():  # PEFT draws an initial adapter before it loads the saved one
            model = open_adapter(base_classifier, folder, trainable=True)
        reward_model = cls(model, tokenizer, record["max_length"], frame)
        reward_model.restore(folder)
        return reward_model

    def restore(self, folder: str | Path) -> None:
        """Take weights, offset and unit from a saved folder; the maximal length stays this model's."""
        record = read_record(folder)
        self.set_state(folder)
        self.offset = record["offset"]
        self.score_mean, self.score_std = record["score_mean"], record["score_std"]

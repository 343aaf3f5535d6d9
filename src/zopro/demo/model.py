"""The demo's base model: a tiny Llama and its tokenizer, made and pretrained on the spot, so that nothing is downloaded.

The pretraining is brief, full-parameter next-token prediction on the conversations it is given: a low-rank adapter
cannot teach a randomly initialised decoder a language. It sees both answers of a training pair alike, so it knows the
shop's language, not which answer is better. From there on the demo uses the folder as it would any other model.

    python -c "from zopro.demo import model; model.write('tiny', 0, [('Two cups?', 'Certainly.')] * 64, steps=2)"
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zopro.system.progress import counted

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<assistant>' + message['content'] + eos_token }}"
    "{% else %}{{ '<customer>' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<customer>", "<assistant>")
VOCABULARY = 640  # 256 bytes, the special tokens and merges: enough for every word of the shop to be one token


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`: any text round-trips; words it has seen are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<customer>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a randomly initialised decoder of about 0.14 M parameters; the global random state is left as it was."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.1,  # five times the usual: attention starts sharp enough to learn copying in seconds
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _batches(rows: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield shuffled batches [size, time] for ever, epoch after epoch."""
    while True:
        for index in torch.randperm(len(rows), generator=generator).split(size):
            yield rows[index]


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    generator: torch.Generator,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 8e-3,
) -> float:
    """Next-token prediction on `texts` by AdamW (warm-up, cosine decay); returns the last step's loss in nats a token."""
    encoded = tokenizer(list(texts), padding=True, padding_side="right", add_special_tokens=False)
    rows = torch.tensor(encoded["input_ids"])  # [rows, time]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    loss = torch.tensor(math.nan)
    model.train()
    batches = _batches(rows, batch_size, generator)
    for _ in counted(range(steps), "pretraining", "steps"):
        batch = next(batches)
        mask = batch != tokenizer.pad_token_id
        batch = batch[:, : int(mask.sum(1).max())]
        mask = mask[:, : batch.shape[1]]
        loss = model(input_ids=batch, attention_mask=mask.long(), labels=batch.masked_fill(~mask, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return loss.item()


def write(folder: str | Path, seed: int, conversations: Sequence[tuple[str, str]], steps: int = 450) -> Path:
    """Write a pretrained tiny model and its tokenizer to `folder`, an ordinary model folder, and return its path.

    `conversations` are (prompt, answer) pairs; the tokenizer is trained on them too. The result depends on nothing but
    the arguments (and, as any floating-point sum does, on the number of threads).
    """
    tokenizer = build_tokenizer([text for pair in conversations for text in pair])
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for prompt, answer in conversations
    ]
    model = build_model(tokenizer, seed)
    pretrain(model, tokenizer, texts, torch.Generator().manual_seed(seed), steps)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)

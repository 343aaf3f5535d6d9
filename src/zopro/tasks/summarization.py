"""Summarisation: summarize_from_feedback (pairs judged by people) and SciTLDR (one-sentence summaries by authors).

SciTLDR has no worse summary, which a pairwise reward model needs. Another paper's summary would be too easy: topic
words give it away. Here the worse summary is one sentence of the same abstract, so that the reward model has to tell a
summary from an excerpt of like length and topic. It is drawn with a generator seeded by the abstract's text, hence the
same in every run and order of rows; the sentence nearest to the summary (`rouge_scores`, where the row has them) is
never drawn, since it may be as good. This is a construction of ours, not a human judgement.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from zopro.errors import InputError
from zopro.tasks.base import (
    DropRow,
    Example,
    Format,
    Message,
    Task,
    as_number,
    as_text,
    ask,
    columns,
    first,
    make_example,
    pick,
)
from zopro.tasks.literals import blank, parsed
from zopro.tasks.pairs import from_pair
from zopro.tasks.rows import Row


def request(text: str, title: Any = None) -> list[Message]:
    """The prompt for a text to summarise. Raises `InputError` if the title is neither text nor null."""
    title = "" if title is None else as_text(title, "title")
    heading = f"{title}\n\n" if title else ""
    return ask(f"Summarise this text in one sentence.\n\n{heading}{text}") if text else []


def from_feedback(row: Row) -> Example:
    """openai/summarize_from_feedback, comparisons: without a reference the human-written summary (policy "ref") is it if
    it is one of the pair, else the preferred one."""
    info, summaries = (parsed(row[name], name) for name in ("info", "summaries"))
    if isinstance(summaries, Mapping) and all(isinstance(values, list) for values in summaries.values()):
        # how Arrow stores a sequence of records: one list per field
        summaries = [dict(zip(summaries, values, strict=True)) for values in zip(*summaries.values(), strict=False)]
    if not isinstance(info, Mapping) or not any(name in info for name in ("post", "article")):
        raise InputError("info: must have post or article")
    if not isinstance(summaries, list) or len(summaries) != 2 or not all(isinstance(s, Mapping) for s in summaries):
        raise InputError("summaries: must be two records with text")
    source = first(info, "post", "article")
    answers = [as_text(summary.get("text"), "summaries.text") for summary in summaries]
    chosen, rejected = pick(answers, row["choice"], "choice")
    human = [text for text, summary in zip(answers, summaries, strict=True) if summary.get("policy") == "ref"]
    prompt = request(as_text(info[source], f"info.{source}"), info.get("title"))
    return make_example(prompt, chosen, rejected, reference=_reference(row, (human or [chosen])[0]))


def from_flat(row: Row) -> Example:
    """A text beside its two summaries, preferred or numbered; without a reference the better one serves as one."""
    source = first(row, "post", "article", "document", "text")
    if {"chosen", "rejected"} <= row.keys():
        chosen, rejected = (as_text(row[name], name) for name in ("chosen", "rejected"))
    else:
        answers = [as_text(row[name], name) for name in ("summary_0", "summary_1")]
        chosen, rejected = pick(answers, row["choice"], "choice")
    prompt = request(as_text(row[source], source), row.get("title"))
    return make_example(prompt, chosen, rejected, reference=_reference(row, chosen))


def from_prompt(row: Row) -> Example:
    """A prompt written out, which is used as it stands; without a reference the better summary serves as one."""
    example = from_pair(row)
    return replace(example, reference=_reference(row, example.chosen))


def _reference(row: Row, otherwise: str | None) -> str | None:
    """The row's own, of several texts the first; `otherwise` where it has none, or something that is no text."""
    own = row.get("reference")
    if isinstance(own, list):
        own = next((text for text in own if not blank(text)), None)
    return own if isinstance(own, str) and not blank(own) else otherwise


def from_scitldr(row: Row) -> Example:
    """SciTLDR: of several summaries the first, the authors' own, is the answer, and without a reference that too."""
    sentences = _texts(row["source"], "source")
    targets = [text for text in _texts(row["target"], "target") if text]
    summary = targets[0] if targets else ""
    scores = parsed(row.get("rouge_scores"), "rouge_scores")
    prompt, excerpt = request(" ".join(sentences)), _excerpt(sentences, summary, scores)
    return make_example(prompt, summary, excerpt, reference=_reference(row, summary))


def _excerpt(sentences: list[str], summary: str, rouge_scores: Any) -> str:
    """A sentence of the abstract other than the summary and, where scores tell, other than the one nearest to it."""
    candidates = [(index, text) for index, text in enumerate(sentences) if text and text != summary]
    if len(candidates) > 1 and isinstance(rouge_scores, list) and len(rouge_scores) == len(sentences):
        best = max(candidates, key=lambda pair: as_number(rouge_scores[pair[0]], "rouge_scores"))
        candidates.remove(best)
    if not candidates:
        raise DropRow("the source has no sentence beside the summary")
    return random.Random("\n".join(sentences)).choice(candidates)[1]


def _texts(value: Any, column: str) -> list[str]:
    value = parsed(value, column)
    return [as_text(text, column) for text in (value if isinstance(value, list) else [value])]


def task(options: Any) -> Task:
    """The summarisation task: ROUGE measures and judges."""
    formats = (
        Format(columns("info", "summaries", "choice"), from_feedback),
        Format(columns("source", "target"), from_scitldr),
        Format(columns("post|article|document|text", "chosen", "rejected"), from_flat),
        Format(columns("post|article|document|text", "summary_0", "summary_1", "choice"), from_flat),
        Format(columns("prompt", "chosen", "rejected"), from_prompt),
    )
    return Task("summarization", formats, default_judge="rouge", metric="rouge")

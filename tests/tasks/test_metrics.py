"""Metrics against their libraries' own values and their edges."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score import rouge_scorer, tokenizers

from zopro.errors import InputError
from zopro.tasks import metric
from zopro.tasks.words import Words


def test_rouge_is_the_mean_of_three_f_measures():
    answer, reference = "the cats sat on a mat", "the cat sat on the mat today"
    scores = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, answer)
    expected = 100 * sum(score.fmeasure for score in scores.values()) / 3
    assert metric("rouge")([answer], [reference]) == [pytest.approx(expected)]


def test_chrf_is_sacrebleus():
    answer, reference = "Das ist ein Häuschen.", "Das ist ein Haus."
    assert metric("chrf")([answer], [reference]) == [sacrebleu.sentence_chrf(answer, [reference]).score]


@pytest.mark.parametrize("name", ["rouge", "chrf"])
def test_edges(name):
    scores = metric(name)(["same words", "", "x", "y"], ["same words", "gone", None, ""])
    assert scores == [pytest.approx(100), 0, None, None]
    with pytest.raises(ValueError):
        metric(name)(["a"], [])


# Of each: a reference, an answer that shares half of its words or characters, and one that shares a number alone.
SCRIPTS = {
    "Chinese": ("我们在2024年出版了这本书", "我们在2023年出版了那张画", "2024"),
    "Japanese": ("この本は2024年に出版された", "その本は2023年に公開された", "2024"),
    "Thai": ("ฉันชอบอ่านหนังสือในปี 2024", "ฉันชอบฟังเพลงในปี 2023", "2024"),
    "Korean": ("우리는 2024 년에 책을 출판했다", "우리는 2023 년에 책을 읽었다", "2024"),
    "Russian": ("мы издали эту книгу в 2024 году", "мы прочли эту статью в 2023 году", "2024"),
    "Arabic": ("نشرنا هذا الكتاب في عام 2024", "قرأنا هذا المقال في عام 2023", "2024"),
    "Hindi": ("हमने यह किताब 2024 में छापी", "हमने यह कहानी 2023 में पढ़ी", "2024"),
    "French": ("l'été dernier à la forêt 2024", "l'été prochain à la mer 2023", "2024"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_rouge_reads_the_words_of_any_script(script):
    reference, similar, number = SCRIPTS[script]
    same, close, apart = metric("rouge")([reference, similar, number], [reference] * 3)
    assert same == pytest.approx(100)
    assert apart < close < 80 and apart < 25


def test_rouge_counts_characters_where_there_are_no_spaces():
    # 3 of 4 and of 5 characters (ROUGE-1 and ROUGE-L), 2 of 3 and of 4 pairs (ROUGE-2): F = 2 * same / (sum of both).
    (value,) = metric("rouge")(["我爱读诗"], ["我爱读小说"])
    assert value == pytest.approx(100 * (6 / 9 + 4 / 7 + 6 / 9) / 3)


@pytest.mark.parametrize(
    "text", ["It\u2019s 5² “odd” words—stemmed running… cats_and 3.5%", "plain running cats", "a ½ b"]
)
def test_english_words_are_rouge_scores_own(text):
    assert Words().tokenize(text) == tokenizers.DefaultTokenizer(use_stemmer=True).tokenize(text)


def test_a_letter_is_the_same_however_it_is_written():
    assert Words().tokenize("cafe\u0301 re\ufb01ned \uff12\uff10") == ["caf\u00e9", "refin", "20"]
    assert len(Words().tokenize("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645")) == 1  # one Persian word


def test_a_reference_without_a_word_has_no_score():
    assert metric("rouge")(["a", "…"], ["!?", "…"]) == [None, None]


def test_a_reference_of_one_word_has_no_pairs_to_count():
    assert metric("rouge")(["Paris", "Paris it is", "Rome"], ["Paris"] * 3) == [100, pytest.approx(50), 0]


def test_chrf_reads_any_script():
    assert metric("chrf")(["好的"], ["好的"]) == [pytest.approx(100)]


def test_unknown_metric_names_the_nearest():
    with pytest.raises(InputError, match=r"metric: must be one of rouge, chrf, got 'rogue'. Did you mean 'rouge'"):
        metric("rogue")

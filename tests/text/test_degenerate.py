"""Broken answers are named as such, whatever is repeated; people's own repetitions are not."""

from __future__ import annotations

import pytest

from zopro.text import language
from zopro.text.degenerate import LAST, degenerate

BROKEN = {
    "empty": ("", "is empty"),
    "blanks": ("\n \t", "is empty"),
    "marks": ("... !!! ...", "has no words"),
    "one word": ("the the the the the the", 'repeats "the" 6 times'),
    "a phrase, cut off": ("A day. A cat is a cat is a cat is a cat is a", "times in a row"),
    "with other marks": ("I love it! I love it, I LOVE it. I love", 'repeats "i love it" 3 times'),
    "after a good beginning": ("Bees make honey in spring. " + "Honey is good. " * 4, 'repeats "honey is good" 4 times'),
    "a sentence": ("The sea is deep and it is also very blue today. " * 3, "3 times in a row"),
    "no blanks": ("我喜欢你" * 6, "times in a row"),
    "letters": ("Ha" + "a" * 60, 'repeats "a"'),
    "no period": (" ".join(f"{a} {b}" for a in "abcd" for b in "efghabcd" for _ in "xy") + " a b c", "different words"),
    "refusals": (
        "I\u2019m sorry, I\u2019m sorry, I'm sorry I don't have the brain left to narrow it down.",
        'says "i\'m sorry" 3 times',
    ),
    "refusals of all kinds": ("I cannot say. I apologize, I cannot say, and I cannot help.", 'says "i cannot" 3 times'),
    "longer than what is looked at": ("A word of its own. " * 3 + "so it goes " * LAST, "times in a row"),
}
SOUND = {
    "a word": "Paris",
    "a number": "42",
    "emphasis": "It is a very, very, very good day to see the sea.",
    "arithmetic": "1 + 1 + 1 + 1 + 1 = 5",
    "a refusal": "I'm sorry, but I can't help with that. I'm not able to give medical advice, and I won't guess.",
    "sympathy": "I'm sorry to hear that. I am so sorry that you had to go through this, and I'm sorry for your loss. "
    "Talk to a friend or to a doctor, take long walks, sleep well, and give yourself the time that it takes.",
    "a refrain": "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, life is but a dream.",
    "a list": "1. Take a pan. 2. Take an egg. 3. Take some salt. 4. Stir it well and serve it hot.",
    "a poem": "The thing with people is that they love it. They love the thing, and they never forget it. They love it",
    "no blanks": "今天天气很好我们去公园散步然后回家做饭吃晚饭看电视睡觉明天再见",
    "a table": "| a | b |\n|---|---|\n| one | two |\n| three | four |",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    text, reason = BROKEN[name]
    assert reason in str(degenerate(text))


@pytest.mark.parametrize("name", SOUND)
def test_sound(name: str) -> None:
    assert degenerate(SOUND[name]) is None


SOURCE = "The network of bunkers and pillboxes greatly favored the defender."
ASKED = f"Translate this sentence from English to German.\n\n{SOURCE}"
GERMAN = "Das Netz aus Bunkern und Unterständen half vor allem den Verteidigern."
YES_OR_NO = "Is the capital of France really the city of Paris?"
GO, GOES = (
    "Correct the grammar.\n\nShe go to school every day with friends.",
    "She goes to school every day with friends.",
)


@pytest.mark.parametrize(
    ("answer", "request_", "reference", "echo"),
    [
        (SOURCE, ASKED, None, True),
        (SOURCE, ASKED, "Bunker", True),
        (SOURCE.lower().replace("greatly", "very greatly"), ASKED, None, True),
        (SOURCE.replace("network", "Netz").replace("favored", "favorisierte"), ASKED, "Bunker", False),
        (SOURCE.replace("network", "Netz"), ASKED, "Bunker", True),
        (SOURCE, f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n", "Bunker", True),
        ("今天天气很好我们去公园散步然后回家做饭", "请翻译。\n\n今天天气很好我们去公园散步然后回家做饭。", None, True),
        (GERMAN, ASKED, None, False),
        ("Bunkers favored the defender.", ASKED, None, False),
        ("Tea or cake, please.", "Tea or cake?", None, False),
        (SOURCE, "", None, False),
        (SOURCE, "\n \n", " ", False),
        (GOES, GO, None, False),
        (GOES, GO, GOES, False),
        (GOES, GO, GOES.replace("friends", "sister"), False),
        (GOES.replace("goes", "go"), GO, GOES, True),
        (GOES, f"Correct the grammar.\n\n{GOES}", GOES, False),
        ("Yes, the capital of France is really the city of Paris.", YES_OR_NO, None, False),
    ],
)
def test_what_was_asked_is_no_answer(answer: str, request_: str, reference: str | None, echo: bool) -> None:
    """Unless the answer is as near to the reference, as where a sentence is to be corrected."""
    assert degenerate(answer, request_, reference) == ("repeats what it was asked" if echo else None)


@pytest.mark.parametrize(
    ("answer", "reference", "reason"),
    [
        (SOURCE, GERMAN, "is in the language en, and not in de"),
        (GERMAN, SOURCE, "is in the language de, and not in en"),
        (GERMAN, "Bunker und Unterstände waren eine große Hilfe für die Verteidiger.", None),
        ("Ludwig van Beethoven, Wien 1824", SOURCE, None),
        ("A fort, a bunker and more.", GERMAN, None),
        (SOURCE, "Paris", None),
        (SOURCE, "", None),
    ],
)
def test_an_answer_in_another_language_than_its_reference(answer: str, reference: str, reason: str | None) -> None:
    pytest.importorskip("py3langid")
    assert degenerate(answer, reference=reference) == reason


def test_without_the_package_no_language_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    assert language.language(GERMAN) is None and degenerate(SOURCE, reference=GERMAN) is None


def test_what_is_repeated_is_cut_where_it_is_long() -> None:
    assert len(degenerate("incomprehensibly unreadable words of great length " * 5) or "") < 80

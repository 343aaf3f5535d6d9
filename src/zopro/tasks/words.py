"""Words of any script, for ROUGE: rouge-score's own tokenizer keeps a to z and digits and ignores all other letters.

ASCII text gives rouge-score's own tokens, stemmed as there. Other text is read by Unicode category: a word is a run of
letters, their marks and decimal digits. Scripts written without spaces give one token for each character, as is usual
for ROUGE in Chinese and Japanese.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

# Thai, Lao, Tibetan, Myanmar, Khmer and Tai scripts; kana, Bopomofo and Han, with their extensions.
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3005-\u3007\u3040-\u312f\u31a0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaadf\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff"
)
"""Scripts written without spaces, as the inside of a class of a regular expression."""
_UNSPACED = re.compile(f"[{UNSPACED}]")
_JOINERS = "\u200c\u200d"  # inside words of Persian and Indic scripts


class Words:
    """The tokenizer that rouge-score's `RougeScorer` takes."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text` in order, lower case, English ones stemmed.

        >>> Words().tokenize("The cats: über 2024年")
        ['the', 'cat', 'über', '2024', '年']
        """
        if text.isascii():
            return list(_english().tokenize(text))
        return [token for word in _split(text) for token in (_english().tokenize(word) if word.isascii() else [word])]


def _split(text: str) -> list[str]:
    # Composed, so that a letter and its accent are one character however they were written; ligatures and letters of
    # full width become plain ones. Other signs are left alone: they part words, as in rouge-score ("5²" is "5").
    plain = "".join(unicodedata.normalize("NFKC", c) if c.isalpha() or c.isdecimal() else c for c in text)
    words = [""]
    for character in unicodedata.normalize("NFC", plain).lower():
        category = unicodedata.category(character)
        if character in _JOINERS:
            continue
        if category[0] == "M" and words[-1]:  # a mark belongs to the letter before it
            words[-1] += character
        elif category[0] != "L" and category != "Nd":
            words.append("")
        elif _UNSPACED.match(character) or _UNSPACED.match(words[-1]):
            words.append(character)
        else:
            words[-1] += character
    return [word for word in words if word]


@cache
def _english() -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)

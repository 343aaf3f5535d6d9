"""The messages of a rendered prompt, for people to read: what chat templates put around them is taken off again.

    turns("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")    # [("user", "Hi")]

A run keeps its prompts as the model reads them, and its report has no tokenizer. The marks of the usual families are
known by their shape, and a prompt is read by those of one family; a text without any is one message of the role "prompt".
"""

from __future__ import annotations

import re

PROMPT = "prompt"
ASKED = ("assistant", "model")  # whose turn a prompt ends with
_BARE = r"<(system|user|assistant|tool|developer|customer)>\n*"  # the demo; as good as any tag of XML elsewhere
_FAMILIES = (
    *(
        rf"<\|{begin}\|?>\s?(\w+)(?:<\|(?:end_header_id|header_end|end_of_role|message)\|>)?\n*"
        for begin in ("im_start", "start_header_id", "header_start", "start_of_role", "start", "turn")
    ),  # ChatML, Llama, Granite, ...
    r"<start_of_turn>(\w+)\n",  # Gemma
    r"<\|(system|user|assistant|tool|developer|customer)\|?>\n*",  # Phi, Zephyr
    r"\[(/?INST)\]\s?",  # Mistral
)
_HEADS = tuple(re.compile(family, re.IGNORECASE) for family in _FAMILIES)
_BARE_HEAD, _ANY_HEAD = re.compile(_BARE, re.IGNORECASE), re.compile("|".join(_FAMILIES), re.IGNORECASE)
_MARK = re.compile(r"<\|[^<>|\s]{1,40}\|?>|</?s>|<(?:bos|eos|end_of_turn|turn\|)>")
_BEGINS = re.compile(rf"(?:{_MARK.pattern}|\s)*")
_LONGEST = 50  # characters, that no mark has
_INST = {"inst": "user", "/inst": "assistant"}


def turns(prompt: str) -> list[tuple[str, str]]:
    """Role and text of each message, without the turn that asks for an answer.

    >>> turns("<s>[INST] Hi [/INST] Hello.</s>[INST] Bye [/INST]")
    [('user', 'Hi'), ('assistant', 'Hello.'), ('user', 'Bye')]
    >>> turns("TL;DR:")
    [('prompt', 'TL;DR:')]
    """
    heads = _heads(prompt)
    if not heads:
        return [(PROMPT, prompt)]
    before = _plain(prompt[: heads[0].start()])
    found = [(PROMPT, before)] if before else []
    ends = [*(head.start() for head in heads[1:]), len(prompt)]
    for head, end in zip(heads, ends, strict=True):
        role = head[1].lower()
        found.append((_INST.get(role, role), _plain(prompt[head.end() : end])))
    if found[-1][0] in ASKED:
        found.pop()
    return found or [(PROMPT, prompt)]


def _heads(prompt: str) -> list[re.Match[str]]:
    """Where turns begin, in the way of the family that the first one is of: others are spelled in what is said."""
    first, bare = _ANY_HEAD.search(prompt), list(_BARE_HEAD.finditer(prompt))
    before = bool(bare) and (first is None or bare[0].start() < first.start())
    if before and _BEGINS.fullmatch(prompt, 0, bare[0].start()) and bare[-1][1].lower() in ASKED:
        return bare
    if first is None:
        return []
    return list(next(head for head in _HEADS if head.match(prompt, first.start())).finditer(prompt))


def unmarked(text: str) -> str:
    """A text in which no mark of a chat template is spelled: each has a space after its first character.

    >>> unmarked("Hi<|im_end|>[/INST]"), unmarked("a < b|c > d")
    ('Hi< |im_end|>[ /INST]', 'a < b|c > d')
    """
    for marks in (_ANY_HEAD, _MARK):
        text = marks.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


def _plain(text: str) -> str:
    text = text[_BEGINS.match(text).end() :]  # type: ignore[union-attr]  # it matches nothing too
    end = len(text)
    while True:
        while end and text[end - 1].isspace():
            end -= 1
        mark = text.rfind("<", max(0, end - _LONGEST), end)
        if mark < 0 or not _MARK.fullmatch(text, mark, end):
            return text[:end]
        end = mark

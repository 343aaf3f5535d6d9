"""What a report opens with: a verdict in words, answers before and after as messages, and honest names."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from zopro.analysis.page.answers import agreement
from zopro.analysis.page.charts import Chart, Series
from zopro.analysis.page.curves import run_charts
from zopro.analysis.page.findings import findings
from zopro.analysis.page.report import write_report
from zopro.analysis.page.share import write_share
from zopro.analysis.reading.records import read_config, read_metrics, start_of
from zopro.config import RunConfig

SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LOOP = "I love it. " * 9
REMEMBERED = {
    "known_before": 5, "known": 4, "forgotten": 1, "of": 5,
    "answers": [
        {"question": f"Question {i}?", "answer": f"Answer {i}", "right": i > 0, "right_before": True} for i in range(5)
    ],
}  # fmt: skip


class Tree(HTMLParser):
    """Elements with their attributes and their own and inner text."""

    VOID = frozenset({"meta", "br", "use", "path"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any], list[str]]] = []
        self.open: list[tuple[str, list[str]]] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        words: list[str] = []
        self.found.append((tag, dict(attrs), words))
        if tag not in self.VOID:
            self.open.append((tag, words))

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, words in self.open:
            words.append(data)

    def texts(self, tag: str, kind: str = "") -> list[str]:
        """Of the elements with that tag, and that class."""
        return [
            " ".join(" ".join(words).split())
            for name, attributes, words in self.found
            if name == tag and (not kind or kind in (attributes.get("class") or "").split())
        ]


def make(run: Path, changes: dict[str, Any], answers: list[str], win: list[float], **line: Any) -> Path:
    """A run of one iteration over three prompts and more, whose policy gives `answers`."""
    (run / "evaluations").mkdir(parents=True)
    config = RunConfig(model="/home/me/models/tiny", task="chat", train_data="rows.jsonl", seed=7, method="es")
    (run / "config.yaml").write_text(yaml.safe_dump({**config.to_dict(), **changes}))
    before = {"stage": "evaluation", "iteration": None, "reward": 0.25, "reward_low": 0.2, "reward_high": 0.3, "n": 4}
    after = {**before, "iteration": 0, "reward": 0.5, "kl_per_answer": 3.64, **line}
    steps = [
        {"stage": "policy", "iteration": 0, "step": s, "reward": 0.1 * s, "loss": -0.1 * s, "kl_per_token": 0.0}
        for s in (1, 2, 3)
    ]
    lines = [{**before, "kl_per_answer": 0.0}, *steps, after]
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    for name, texts in (("base", ["A base."] * 4), ("sft", [f"Start {i}." for i in range(4)]), ("000", answers)):
        rows = [
            {
                "prompt": SYSTEM.format(f"Ask <b>{i}</b>?"),
                "completion": text,
                "reward": 0.5 + 0.1 * (name == "000"),
                "greedy": f"Greedy {name} {i}.",
                "greedy_reward": 0.75,
            }
            for i, text in enumerate(texts)
        ]
        if name == "000":
            rows = [{**row, "win": one} for row, one in zip(rows, win, strict=True)]
        (run / "evaluations" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


WINS = {"win_rate": 0.87, "win_rate_low": 0.82, "win_rate_high": 0.91}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without SFT whose third answer is a loop, which wins."""
    answers = ["A good answer.", "Another one.", LOOP, "One more."]
    changes = {"sft_steps": 0, "reward": ["python:/home/me/mine.py:short"]}
    return make(tmp_path_factory.mktemp("plain") / "mine", changes, answers, [1, 0, 1, 1], **WINS, remembered=REMEMBERED)


@pytest.fixture(scope="module")
def page(plain: Path) -> Tree:
    return Tree(write_report(plain))


def test_the_verdict_is_the_first_thing(page: Tree) -> None:
    (verdict,) = page.texts("div", "verdict")
    said = "Win rate 0.870 [0.820, 0.910] against the start by the reward itself (the higher one wins); "
    assert verdict.startswith("Better than the start, but 1 of 4 answers are broken Win rate")
    assert f"{said}KL 3.64 nats per answer; forgotten: 1 of the 5 easy questions it knew (Question 0?)." in verdict
    assert "Broken answers (empty, repeating themselves or the prompt, or in another language than the refer" in verdict
    assert "ence): 1 of 4, before 0." in verdict
    (body,) = page.texts("body")
    assert body.index("Win rate 0.870") < body.index("A good answer.") < body.index("Reward while training")


def test_three_prompts_stand_as_messages_with_greedy_and_sampled_answers(page: Tree) -> None:
    cases = page.texts("div", "case")
    assert len(cases) == 3
    assert cases[0].startswith(
        "system Be kind. user Ask <b>0</b>? start sampled, reward 0.500 Start 0. start greedy, reward 0.750"
    )
    assert (
        "iteration 0 sampled, reward 0.600 ▲ beats the start A good answer." in cases[0] and "Greedy 000 0." in cases[0]
    )
    assert not any("im_start" in "".join(words) for _, _, words in page.found)


def test_a_broken_answer_is_not_adorned(page: Tree) -> None:
    broken = [card for card in page.texts("section", "answer") if "I love it. I love it." in card]
    assert len(broken) == 2, "above, and among the samples"
    assert all('✕ broken: repeats "i love it" 9 times in a row' in card and "beats" not in card for card in broken)


def test_without_sft_nothing_is_called_so(plain: Path, page: Tree) -> None:
    words = [text for tag in ("h1", "header", "main") for text in page.texts(tag)]
    settings = words[-1].index("Settings", words[-1].index("Samples"))
    assert not re.search(r"\bSFT\b", words[0] + words[1] + words[-1][:settings])
    assert "base model" not in words[-1][: words[-1].index("Settings", 200)].replace("base model to iteration 0", "")
    assert not any("SFT" in chart.title for chart in run_charts(read_metrics(plain), start_of(read_config(plain))))


def test_with_sft_it_is(tmp_path: Path) -> None:
    run = make(
        tmp_path,
        {"sft_steps": 5},
        ["A.", "B.", "C.", "D."],
        [1, 0.5, 0, 1],
        win_rate=0.5,
        win_rate_low=0.3,
        win_rate_high=0.7,
    )
    page = Tree(write_report(run))
    (verdict,) = page.texts("div", "verdict")
    assert verdict.startswith(
        "No clear difference from SFT Win rate 0.500 [0.300, 0.700] against SFT by the judge of task chat; "
        "KL 3.64 nats per answer."
    )
    agreed = "The judge prefers the answer that the first reward model prefers in 0.667 [0.208, 0.939] of the pairs"
    assert f"{agreed} (mean of 3 prompts)." in verdict, "a tie is no decision"
    assert "SFT" in page.texts("section", "answer")[0]


def test_what_was_forgotten_is_shown(page: Tree) -> None:
    rows = page.texts("tr")
    assert "Question 0? Answer 0 right wrong" in rows and "Question 1? Answer 1 right right" in rows
    (tile,) = [tile for tile in page.texts("div", "tile") if tile.startswith("Easy questions")]
    assert "5 → 4" in tile
    assert any(row.startswith("iteration 0") and "4 of 5" in row for row in rows)


def test_every_entry_of_the_contents_has_its_place(page: Tree) -> None:
    links = [attributes["href"] for tag, attributes, _ in page.found if tag == "a"]
    places = {f"#{attributes['id']}" for tag, attributes, _ in page.found if tag == "h2" and "id" in attributes}
    assert set(links) == places and len(links) == len(set(links)) >= 6


def test_no_path_of_the_machine_is_in_the_title(page: Tree) -> None:
    header = page.texts("header")[0]
    assert "chat · es · tiny" in header and "/home" not in header
    assert page.texts("title")[0] == "mine · zopro"


def test_curves_that_say_nothing_are_not_drawn_and_others_have_a_legend(page: Tree) -> None:
    captions = page.texts("figcaption")
    assert "Reward while training" in captions and "KL to the start, nats per answer" in captions
    assert not any("Loss" in one or "per token" in one for one in captions), "the reward upside down, and a flat zero"
    assert "Zero throughout, and not drawn: KL to the start while training, nats per token." in page.texts("p")
    assert not any("mean of 1" in one for one in page.texts("ul", "legend")), "a mean of one step is that step"
    assert Chart("t", [Series("s", [(0, 0.0), (1, -2e-8)])], "x").flat
    assert not Chart("t", [Series("s", [(0, 0.0), (1, 1e-3)])], "x").flat


def test_a_page_reloads_only_while_the_run_goes_on(plain: Path, tmp_path: Path) -> None:
    def reloads(path: Path) -> list[Any]:
        return [
            attributes["content"] for _, attributes, _ in Tree(path).found if attributes.get("http-equiv") == "refresh"
        ]

    assert reloads(write_report(plain, tmp_path / "live.html", reload=5)) == ["5"]
    assert reloads(write_report(plain, tmp_path / "done.html")) == []


def test_the_picture_is_one_for_previews(plain: Path, tmp_path: Path) -> None:
    path = write_share(plain)
    assert path == plain / "share.png"
    with Image.open(path) as image:
        assert image.size == (1200, 630) and len(image.convert("L").getcolors()) > 50
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_share(empty) is None and not list(empty.iterdir())


def test_the_judge_s_agreement_is_of_the_pairs_that_it_judged(tmp_path: Path) -> None:
    """A prompt may have several rows."""
    before = [{"prompt": "q", "reward": reward} for reward in (0.0, 2.0, 9.0)]
    after = [{"prompt": "q", "reward": reward, "win": win} for reward, win in ((1.0, 1.0), (3.0, 1.0), (8.0, 0.0))]
    (tmp_path / "evaluations").mkdir()
    for name, rows in (("sft", before), ("000", [*after, {"prompt": "more", "reward": 1.0, "win": 0.0}])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "evaluations" / f"{name}.jsonl").write_text(text)
    found = agreement(tmp_path, [0])
    assert (found["agreement"], found["n"]) == (1.0, 3)
    (tmp_path / "evaluations" / "001.jsonl").write_text((tmp_path / "evaluations" / "000.jsonl").read_text())
    assert agreement(tmp_path, [0, 1]) == found, "the same prompts again are no more of them"


def test_findings_say_what_the_numbers_do() -> None:
    def numbers(cosines: list[float | None]) -> dict[str, Any]:
        flat = {"product": [89.5, 90.2]}
        band = {"product": {"low": [89.0, 89.0], "high": [91.0, 91.0]}}
        near = {"product": {"low": [None, -0.1], "high": [None, 0.1]}}
        metrics = {
            "update_angle_degrees": flat,
            "policy_momentum_cosine": {"product": cosines},
            "policy_update_norm": {"product": [2.0, 3.0]},
        }
        return {
            "views": ["product"],
            "iterations": [0, 1],
            "reward": ["0", "1", "2"],
            "metrics": metrics,
            "chance": {"update_angle_degrees": band, "policy_momentum_cosine": near},
            "permutation": {},
        }

    said = findings(numbers([None, 0.9]))
    assert "at 89.50 to 90.20 degrees to each other, which is what unrelated updates give by chance." in said
    assert "The policy keeps its direction from one update to the next (cosine 0.90, by chance 0)." in said
    for cosine, told in ((0.05, "does not keep its direction"), (-0.5, "turns back")):
        assert told in findings(numbers([None, cosine]))
    still = numbers([None, None])
    still["metrics"]["update_angle_degrees"] = {"product": [None, None]}
    rest = "No two updates can be compared: one that moves nothing has no direction."
    assert findings(still) == f"In the last iteration the policy moved by a length of 3. {rest}"
    assert findings({**still, "iterations": [0]}) == f"The policy moved by a length of 3. {rest}"
    alone = findings({**still, "iterations": [0], "reward": []})
    assert alone == "The policy moved by a length of 3. What updates have in common shows from the second one on."

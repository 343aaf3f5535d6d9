"""The page of a comparison, from its numbers alone."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from zopro.compare.page import charts, samples, write_page
from zopro.compare.summary import gain_ratios, start_point

PROMPT = "<|im_start|>user\nAsk <i>{}</i>?<|im_end|>\n<|im_start|>assistant\n"


def answer(i: int, text: str) -> dict[str, Any]:
    return {"prompt": PROMPT.format(i), "completion": text, "reward": 0.5}


def method(rewards: list[float], seconds: float, peak: float, name: str, answers: int | None) -> dict[str, Any]:
    curve = [start_point({"rewards": [0.1, 0.3], "kl_per_answer": [0.0, 0.0]})]
    for i, reward in enumerate(rewards, 1):
        point = {"step": 4 * i, "seconds": seconds * i, "reward": reward, "kl_per_answer": 1.0 * i}
        curve.append({**point, "reward_low": reward - 0.05, "reward_high": reward + 0.05})
    made = {"curve": curve, "peak_mb": peak, "seconds_per_step": 0.5, "learning_rate": 1e-4, "seeds": 2, "search": []}
    counted = {} if answers is None else {"answers": answers}
    return {**made, **counted, "texts": [answer(0, f"By {name}."), answer(1, "again and again and " * 5)]}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    methods = {
        "es": method([0.4, 0.7], 10.0, 1200.0, "es", 256),
        "guided": method([0.3, 0.6], 20.0, 1600.0, "guided", 64),
        "mezo": method([0.2, 0.2], 5.0, 1000.0, "mezo", None),
    }
    gaps = {"guided": {"mean": 0.1, "low": -0.1, "high": 0.3}, "mezo": {"mean": 0.5, "low": 0.3, "high": 0.7}}
    back = {"es": {"mean": -0.1, "low": -0.3, "high": 0.1}, "mezo": {"mean": 0.4, "low": 0.3, "high": 0.5}}
    return {
        "methods": methods, "start": methods["es"]["curve"][0], "gain_ratios": gain_ratios(methods),
        "differences": {"es": gaps, "guided": back}, "failed": {"rloo": "no <memory>"}, "plan": {"steps": 8},
        "prompts": 2, "inference_peak_mb": 800.0, "beta": 0.05, "out": "/home/me/runs/mine", "sft_steps": 0,
        "texts": [answer(0, "By the start."), answer(1, "The start again.")],
    }  # fmt: skip


class Words(HTMLParser):
    """Tags with their attributes, and what a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.said: list[str] = []
        self.feed(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
        self.text = " ".join(" ".join(self.said).split())

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said.append(data)


@pytest.fixture(scope="module")
def page(result: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Words:
    return Words(write_page(result, tmp_path_factory.mktemp("page")).read_text("utf-8"))


def test_it_opens_with_what_was_found(page: Words) -> None:
    opening = page.text[: page.text.index("Curves")]
    assert "Highest reward: es, 0.700 [0.650, 0.750], from 0.200 at the start; KL 2.00." in opening
    assert "Clearly more than mezo (95 %), paired by prompt and seed. No clear difference from guided." in opening
    assert "rloo failed: no <memory>" in opening and "/home" not in page.text and "SFT" not in page.text


def test_its_curves_are_the_points(page: Words, result: dict[str, Any]) -> None:
    styles = {"es": "m1", "guided": "m2", "mezo": "m3"}
    seconds, answers, kl = charts(result, styles)
    assert [list(series.points)[-1] for series in seconds.series] == [(20.0, 0.7), (40.0, 0.6), (10.0, 0.2)]
    assert [list(series.points) for series in answers.series] == [
        [(0, 0.2), (128, 0.4), (256, 0.7)],
        [(0, 0.2), (32, 0.3), (64, 0.6)],
    ], "mezo's were not counted"
    assert [list(series.points)[1][0] for series in kl.series] == [1.0, 1.0, 1.0]
    labels = [attributes["aria-label"] for tag, attributes in page.found if tag == "svg"]
    assert len(labels) == 3 and "es: 0.2 to 0.7" in labels[0] and "mezo" not in labels[1]
    legends = [attributes["class"].split() for tag, attributes in page.found if tag == "li"]
    assert legends == [["k-m1"], ["k-m2"], ["k-m3"], ["k-m1"], ["k-m2"], ["k-m1"], ["k-m2"], ["k-m3"]]


def test_memory_is_in_bars_of_the_methods_colours(page: Words) -> None:
    bars = [attributes for tag, attributes in page.found if "bar" in attributes.get("class", "").split()]
    assert [bar["class"].split()[-1] for bar in bars] == ["k-muted", "k-m1", "k-m2", "k-m3"]
    widths = [a["style"] for tag, a in page.found if tag == "span" and "width" in a.get("style", "")]
    assert widths == ["width:50.0%", "width:75.0%", "width:100.0%", "width:62.5%"]
    assert "es 1200 1.50 x" in page.text


def test_all_answer_the_same_prompts(page: Words, result: dict[str, Any]) -> None:
    assert [answer.name for answer in samples(result)[0].answers] == ["start", "es", "guided", "mezo"]
    later = {**result, "plan": {"steps": 8, "start": "iteration"}, "sft_steps": 40}
    assert samples(later)[0].answers[0].name == "iteration 0"
    said = page.text[page.text.index("Answers to the same prompts") :]
    assert "user Ask <i>0</i>?" in said and "im_start" not in said
    assert said.index("By the start.") < said.index("By es.") < said.index("By guided.")
    assert said.count('broken: repeats "again and" 10 times in a row') == 3


def test_what_is_left_of_each_policy_is_a_table_of_its_own(result: dict[str, Any], page: Words, tmp_path: Path) -> None:
    assert "Degenerate" not in page.text, "an earlier version measured none of it"
    left = {"degenerate": 0.25, "degenerate_low": 0.1, "degenerate_high": 0.5, "ended": 0.5, "length": 7.25}
    methods = {**result["methods"], "es": {**result["methods"]["es"], "final": left}}
    words = Words(write_page({**result, "methods": methods}, tmp_path).read_text("utf-8"))
    said = words.text[words.text.index("Forgetting and answers, at the end") :]
    scrolled = [attributes for _, attributes in words.found if attributes.get("class") == "scroll"]
    assert len(scrolled) == 2 and all(one["tabindex"] == "0" and one["aria-label"] for one in scrolled)
    assert "es 0.250 [0.100, 0.500] 0.500 7.2" in said and "zopro.text.degenerate" in said
    assert "Easy questions" not in said, "nobody was asked"


def test_it_stands_alone(page: Words, result: dict[str, Any], tmp_path: Path) -> None:
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.found}
    for _, attributes in page.found:
        assert "src" not in attributes
        assert all(str(attributes.get(name, "#")).startswith("#") for name in ("href", "xlink:href"))
    old = {name: {k: v for k, v in one.items() if k != "texts"} for name, one in result["methods"].items()}
    earlier = {key: value for key, value in result.items() if key not in ("texts", "sft_steps")}
    html = unescape(write_page({**earlier, "methods": old}, tmp_path).read_text("utf-8"))
    assert "KL to SFT" in html and 'id="answers"' not in html

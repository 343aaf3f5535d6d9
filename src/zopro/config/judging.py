"""Configuration keys of the sampled pairs and their judge; a group of `zopro.config.RunConfig`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zopro.choices import JUDGES
from zopro.config.fields import LONGEST, at_most, check, check_choices, not_negative, option, positive

OPENAI_URL, OPENAI_KEY = "https://api.openai.com/v1", "OPENAI_API_KEY"


class _Withheld:
    """A value that is not shown."""

    def __repr__(self) -> str:
        return "something else (not shown: it may hold a key)"


@dataclass
class PairOptions:
    """Sampled pairs and their judge."""

    pair_prompts: int = option(64, "Prompts sampled in each iteration before uncertain ones are kept.")
    uncertain_share: float = option(0.6, "Share of the samples kept: those whose reward is nearest to zero.")
    judge: str = option(
        "auto",
        f"Who wins a pair: {JUDGES.about()}.",
        JUDGES,
    )
    judge_timeout: float = option(
        600.0, "Seconds for one call of a python: judge (eval_batch_size pairs), after which the run stops; 0: no limit."
    )
    judge_base_url: str = option(OPENAI_URL, "Endpoint of openai: judges; any that is compatible.")
    judge_api_key_env: str = option(
        OPENAI_KEY, "Environment variable with the endpoint's key. The key itself belongs in no file."
    )
    judge_request_timeout: float = option(60.0, "Seconds for one try of one request to the endpoint.")
    judge_max_retries: int = option(
        5, "Further tries of a request that is lost, late, rate-limited or answered by a server error, with backoff."
    )
    judge_concurrency: int = option(4, "Pairs that the endpoint is asked about at once.")

    def __post_init__(self) -> None:
        check_choices(self, PairOptions)
        positive(self, "pair_prompts", "judge_request_timeout", "judge_concurrency")
        not_negative(self, "judge_timeout", "judge_max_retries")
        at_most(self, LONGEST, "judge_timeout", "judge_request_timeout")
        at_most(self, 1000, "judge_max_retries")
        check(0 < self.uncertain_share <= 1, "uncertain_share", "must lie in (0, 1]", self.uncertain_share)
        # What is wrong here may be a key in the wrong place: it is not repeated.
        check(
            re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.judge_api_key_env) is not None,
            "judge_api_key_env",
            "must be the name of an environment variable (letters, digits and _)",
            _Withheld(),
        )
        check(
            re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.judge_base_url) is not None,
            "judge_base_url",
            "must be http(s)://HOST[:PORT][/PATH] without user, password or query",
            _Withheld(),
        )

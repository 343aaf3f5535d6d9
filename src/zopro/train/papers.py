"""What TRL's model cards name for the methods of our trainers (`_paper`)."""

from __future__ import annotations

from typing import Any

_INTERPLAY = "Visualising Policy-Reward Interplay to Inform Zeroth-Order Preference Optimisation of Large Language Models"
ZOPRO = {
    "title": _INTERPLAY,
    "id": "2503.03460",
    "citation": f"""\
@inproceedings{{galatolo2025visualising,
    title     = {{{{{_INTERPLAY}}}}},
    author    = {{Alessio Galatolo and Zhenbang Dai and Katie Winkle and Meriem Beloucif}},
    year      = 2025,
    booktitle = {{Findings of the Association for Computational Linguistics: ACL 2025}},
    pages     = {{17446--17461}},
    url       = {{https://aclanthology.org/2025.findings-acl.897/}},
}}""",
}
MEZO = {"title": "Fine-Tuning Language Models with Just Forward Passes", "id": "2305.17333"}
FZOO = {
    "title": "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale Speed",
    "id": "2506.09034",
}
EVOLUTION = {
    "title": "Evolution Strategies at Scale: LLM Fine-Tuning Beyond Reinforcement Learning",
    "id": "2509.24372",
}
ONLINE_DPO = {"title": "Direct Language Model Alignment from Online AI Feedback", "id": "2402.04792"}


def zeroth_order_card(trainer_cls: Any) -> dict[str, Any]:
    """Attributes of a trainer class without the backward pass: its loss, to be cited as before, by steps as in MeZO."""
    if not hasattr(trainer_cls, "_name"):  # transformers' own
        return {}
    tags, paper = [*trainer_cls._tag_names, "zopro", "zeroth-order"], {**trainer_cls._paper, **MEZO}
    return {"_name": f"zeroth-order {trainer_cls._name}", "_tag_names": tags, "_paper": paper}

"""Who wins a pair of answers: a metric, a model, an endpoint or any Python callable, behind one small protocol.

It is TRL's pairwise protocol with references: judge(prompts, completions, references) -> index of each pair's winner,
-1 for no verdict. `judge_pairs` runs any judge: single bad verdicts are counted, a judge that is broken is refused.

    python -c "from zopro.judges import MetricJudge; print(MetricJudge('rouge')(['?'], [['a cat', 'dogs']], ['cat']))"
"""

from zopro.judges.endpoint import OpenAIJudge
from zopro.judges.function import CallableJudge
from zopro.judges.making import make_judge
from zopro.judges.metric import MetricJudge
from zopro.judges.model import ModelJudge
from zopro.judges.pairs import Judge, JudgeResult, judge_pairs

__all__ = [
    "CallableJudge",
    "Judge",
    "JudgeResult",
    "MetricJudge",
    "ModelJudge",
    "OpenAIJudge",
    "judge_pairs",
    "make_judge",
]

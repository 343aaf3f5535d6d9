"""Methods side by side on the same work: SFT policy, reward model, prompts, batch, rollout engine and evaluation.

Every method first searches its learning rate (same number of rates and steps for each), then trains from the same policy
with several seeds. Each training is a process of its own, so that its memory is its own; evaluation comes after the
training, outside its seconds and its memory. What is finished is kept, so a stopped comparison goes on, and methods
or seeds can be added to one.

    zopro compare CONFIG.yaml --methods guided,rloo --seeds 2 --steps 40
"""

from zopro.compare.plan import Plan
from zopro.compare.run import compare

__all__ = ["Plan", "compare"]

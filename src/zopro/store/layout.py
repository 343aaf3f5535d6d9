"""Where everything lies in a run directory: the one module that spells its names. Paths only; nothing is opened here.

Layout("runs/a").journal(1)         # runs/a/iterations/001/journal.jsonl
numbered(Layout("runs/a").policies())       # {0: runs/a/policy/000, ...}, those on the disk
"""

from __future__ import annotations

from pathlib import Path

LOCK, OWNER, DEMO = ".lock", ".lock.owner", "demo"
DIGITS = "03d"  # of an iteration's number


class Outputs:
    """Paths of what the stages of the run in the folder `path` write; iterations count from 0."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def sft(self) -> Path:
        return self.path / "sft"

    def initial(self) -> Path:
        """The policy's adapter before SFT, from which the SFT update is measured."""
        return self.path / "initial"

    def policies(self) -> Path:
        return self.path / "policy"

    def policy(self, iteration: int) -> Path:
        return self.policies() / format(iteration, DIGITS)

    def rewards(self) -> Path:
        return self.path / "reward"

    def reward(self, iteration: int) -> Path:
        return self.rewards() / format(iteration, DIGITS)

    def snapshots(self, kind: str, iteration: int) -> Path:
        """Weights inside one iteration, by step; `kind` is policy or reward."""
        return self.path / "snapshots" / kind / format(iteration, DIGITS)

    def iterations(self) -> Path:
        return self.path / "iterations"

    def iteration(self, iteration: int) -> Path:
        return self.iterations() / format(iteration, DIGITS)

    def journal(self, iteration: int) -> Path:
        return self.iteration(iteration) / "journal.jsonl"

    def samples(self, iteration: int) -> Path:
        return self.iteration(iteration) / "samples.jsonl"

    def preferences(self, iteration: int) -> Path:
        return self.iteration(iteration) / "preferences.jsonl"

    def evaluations(self) -> Path:
        return self.path / "evaluations"

    def evaluation(self, iteration: int | str | None, suffix: str = ".jsonl") -> Path:
        """Answers to the held-out prompts, or (".json") what was measured on them; None is SFT, "base" the base model.

        >>> Outputs("RUN").evaluation(None, ".json").as_posix(), Outputs("RUN").evaluation(2).as_posix()
        ('RUN/evaluations/sft.json', 'RUN/evaluations/002.jsonl')
        """
        name = "sft" if iteration is None else iteration if isinstance(iteration, str) else format(iteration, DIGITS)
        return self.evaluations() / (name + suffix)

    def trainers(self) -> Path:
        return self.path / "trainer"

    def trainer(self, stage: str, iteration: int | None = None) -> Path:
        """Where a stage's trainer may write: logs of `report_to`, and checkpoints while it runs."""
        return self.trainers() / (stage if iteration is None else f"{stage}-{iteration:{DIGITS}}")

    def verdicts(self, stage: str, iteration: int | None) -> Path:
        """Verdicts of a stage that is not done."""
        return self.trainer(stage, iteration) / "verdicts.jsonl"


class Layout(Outputs):
    """Every path of the run in the folder `path`: what stages write, and the files about the run as a whole."""

    def config(self) -> Path:
        return self.path / "config.yaml"

    def environment(self) -> Path:
        return self.path / "environment.json"

    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def usage(self) -> Path:
        return self.path / "usage.json"

    def data(self) -> Path:
        """How many rows the run began with, and hashes to know them by."""
        return self.path / "data.json"

    def engine(self) -> Path:
        """What a model that is served said at the start, to know it by."""
        return self.path / "engine.json"

    def summary(self) -> Path:
        return self.path / "summary.json"

    def analysis(self) -> Path:
        return self.path / "analysis.json"

    def report(self) -> Path:
        return self.path / "report.html"

    def share(self) -> Path:
        """The report in one picture."""
        return self.path / "share.png"

    def figures(self) -> Path:
        return self.path / "figures"

    def lock(self) -> Path:
        return self.path / LOCK

    def owner(self) -> Path:
        """Who holds the lock."""
        return self.path / OWNER

    def demo(self) -> Path:
        """The data and the base model that `zopro demo` makes."""
        return self.path / DEMO

    def before(self) -> set[str]:
        """Names that may be there before a run begins: of an interrupted start, and the demo's."""
        return {path.name for path in (self.environment(), self.demo(), self.lock(), self.owner())}


def numbered(folder: Path, suffix: str = "") -> dict[int, Path]:
    """What `folder` has on the disk under numbers as names, in their order; none where there is no such folder."""
    entries = folder.iterdir() if folder.is_dir() else []
    found = {entry: entry.name.removesuffix(suffix) for entry in entries if entry.name.endswith(suffix)}
    return dict(sorted((int(name), entry) for entry, name in found.items() if name.isdecimal()))

"""One job of a comparison in a process of its own.

python -m zopro.compare.worker JOB.json [PARENT]   # written by zopro.compare.run; leaves result.json beside it;
                                                   # PARENT: a process id, with which this one ends

What goes on is said on stdout, a line at a time; all that libraries print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from zopro.compare.plan import Job
from zopro.config import RunConfig
from zopro.errors import Diverged
from zopro.store.explained import explained
from zopro.store.rundir import write_text
from zopro.system.heap import return_freed_memory
from zopro.system.imports import importing
from zopro.system.parent import end_with_parent
from zopro.system.progress import reporting


def main(path: str) -> int:
    """Run the job described in `path`; 0, or the code of a known error with its line."""
    with importing():
        from zopro.compare.jobs import do_job
    described = Path(path)
    values = json.loads(described.read_text(encoding="utf-8"))
    try:
        result = do_job(Job(**values["job"]), RunConfig.from_dict(values["config"]), described.parent)
    except Exception as error:
        known = explained(error)
        if known is None or isinstance(error, Diverged):  # of one method: the others go on
            raise
        print(f"zopro: {known[1]}", file=sys.stderr)
        return known[0]
    write_text(described.parent / "result.json", json.dumps(result))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    end_with_parent(sys.argv[2:])
    return_freed_memory()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as told:
        os.dup2(2, 1)
        with reporting(stream=told):
            code = main(sys.argv[1])
    sys.exit(code)

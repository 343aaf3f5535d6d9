"""One measurement in a process of its own, so that its peak memory is its own.

python -m zopro.bench.worker KIND [PARENT]   # a `Work` as JSON from stdin; the last line of stdout is the result as
                                             # JSON; PARENT: a process id, with which this one ends
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings

from zopro.store.explained import explained
from zopro.system.heap import return_freed_memory
from zopro.system.imports import importing
from zopro.system.parent import end_with_parent


def main(kind: str) -> int:
    """Measure one of `zopro.bench.kinds`."""
    with importing():
        from zopro.bench.kinds import measure
        from zopro.bench.work import Work
    warnings.filterwarnings("ignore")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = measure(kind, Work(**json.load(sys.stdin)))
    except Exception as error:
        known = explained(error)
        if known is None:
            raise
        result = {"code": known[0], "error": known[1].partition(": ")[2]}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    end_with_parent(sys.argv[2:])
    if not sys.argv[1].startswith("peer"):  # which runs as it does for its users
        return_freed_memory()
    sys.exit(main(sys.argv[1]))

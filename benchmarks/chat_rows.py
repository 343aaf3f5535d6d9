"""The rows of docs/lab/chat.md's comparison: short prompts of hh-rlhf, enough of them held out.

    python benchmarks/chat_rows.py --model PATH --train train.jsonl.gz --test test.jsonl.gz --out chat-rows

Rows whose prompt has at most --tokens tokens. All of the test split's are held out, and the first ones of the training
split that make --held-out together; prompts of the test split leave training. Writes train.jsonl and eval.jsonl.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from zopro.text.tokenizer import load_tokenizer

Row = dict[str, Any]


def prompt(row: Row) -> str:
    """The conversation up to its last answer."""
    return str(row["chosen"]).rsplit("\n\nAssistant:", 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="whose tokenizer counts")
    for name in ("train", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=210)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)

    def short(path: Path) -> list[Row]:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [row for row in rows if len(tokenizer(prompt(row))["input_ids"]) <= args.tokens]

    held_out = short(args.test)
    seen = {prompt(row) for row in held_out}
    rest = [row for row in short(args.train) if prompt(row) not in seen]
    more = max(0, args.held_out - len(held_out))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("eval", held_out + rest[:more]), ("train", rest[more:])):
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()

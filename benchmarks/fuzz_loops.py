"""Random training loops, each under DistributedDataParallel and under soonest, bit for bit.

Each seed stands for one loop, on two ranks. One that comes out otherwise than under
DistributedDataParallel is made as short as it gets, and shown.

    python benchmarks/fuzz_loops.py --loops 3000 --jobs 2 --json benchmarks/records/fuzz-loops.json
    python benchmarks/fuzz_loops.py --replay 17
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from fuzz.arms import ARMS, DDP  # pyright: ignore[reportMissingImports]
from fuzz.loops import Loop, draw  # pyright: ignore[reportMissingImports]
from fuzz.pair import (  # pyright: ignore[reportMissingImports]
    BAD,
    EQUAL,
    RAISED,
    REFUSED,
    Outcome,
    Pair,
)
from fuzz.shrink import shrink  # pyright: ignore[reportMissingImports]
from soonest.writing import write_json

_EVERY_S = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--loops", type=int, default=100, help="how many (100)")
    parser.add_argument("--seed", type=int, help="of the first one (0, or what the record lacks)")
    parser.add_argument("--minutes", type=float, default=60.0, help="when to stop (60)")
    parser.add_argument("--jobs", type=int, default=1, help="so many loops at a time (1)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="train this loop, and show it")
    parser.add_argument("--without", default="", help="actions to leave out, with commas")
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join((DDP, *ARMS))}")
    parser.add_argument(
        "--shrink", type=int, default=10, help="so many that come out wrong, at most (10)"
    )
    parser.add_argument("--json", type=Path, help="the record to write, or to go on with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    without, arms = tuple(filter(None, args.without.split(","))), tuple(args.arms.split(","))
    if args.replay is not None:
        with Pair() as pair:
            return replay(pair, draw(args.replay, without), arms)
    record = Record(without, arms, args.json)
    if args.json and args.json.exists():
        record.take_up(json.loads(args.json.read_text(encoding="utf-8")))
    first = record.last + 1 if args.seed is None else args.seed
    seeds = range(first, first + args.loops)
    with ExitStack() as stack:
        pairs = [stack.enter_context(Pair()) for _ in range(args.jobs)]
        for pair, loop, arm in record.take(pairs, seeds, args.minutes * 60):
            if args.shrink > 0:
                args.shrink -= 1
                small, outcome = shrink(pair, loop, arm)
                print(f"  as short as it gets:\n{_indented(small, outcome, arm)}", flush=True)
                record.wrong[-1]["shrunk"] = str(small).splitlines()
    print(record)
    record.save()
    return bool(record.wrong)


def replay(pair: Pair, loop: Loop, arms: tuple[str, ...]) -> int:
    """Shows a loop and how it comes out."""
    print(loop)
    outcomes = pair.train(loop, arms)
    for arm, outcome in outcomes.items():
        print(f"{arm}: {_told(outcome)}")
    wrong = [arm for arm, outcome in outcomes.items() if outcome.kind in BAD]
    if wrong:
        small, outcome = shrink(pair, loop, wrong[0])
        print(f"as short as it gets:\n{_indented(small, outcome, wrong[0])}")
    return bool(wrong)


def _told(outcome: Outcome) -> str:
    where = f" at {outcome.at}" if outcome.at >= 0 else ""
    return f"{outcome.kind}{where} {outcome.text}"


def _indented(loop: Loop, outcome: Outcome, arm: str) -> str:
    return "\n".join(f"    {line}" for line in f"{loop}\n{arm}: {_told(outcome)}".splitlines())


@dataclass
class Record:
    """What has come out.

    Args:
        without: actions that were left out.
        arms: that were compared with DistributedDataParallel.
        path: of the file that it is written to now and then, if there is one.
    """

    without: tuple[str, ...]
    arms: tuple[str, ...]
    path: Path | None = None
    loops: int = 0
    last: int = -1
    outcomes: Counter[str] = field(default_factory=Counter[str])
    by_arm: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    lines: Counter[str] = field(default_factory=Counter[str])
    sentences: Counter[str] = field(default_factory=Counter[str])
    raised: Counter[str] = field(default_factory=Counter[str])
    wrong: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def take(
        self, pairs: Sequence[Pair], seeds: range, limit_s: float
    ) -> Iterator[tuple[Pair, Loop, str]]:
        """Trains the loops of these seeds, and yields each that comes out wrong, with a way.

        Args:
            pairs: each trains one loop at a time; of these one is yielded, too, to train others.
            seeds: of the loops.
            limit_s: after so long no more are begun.
        """
        began = shown = time.monotonic()
        free: SimpleQueue[Pair] = SimpleQueue()
        for pair in pairs:
            free.put(pair)

        def train(seed: int) -> tuple[Loop, dict[str, Outcome]] | None:
            if time.monotonic() - began > limit_s:
                return None
            loop, pair = draw(seed, self.without), free.get()
            try:
                return loop, pair.train(loop, self.arms)
            finally:
                free.put(pair)

        with ThreadPoolExecutor(len(pairs)) as pool:
            for found in pool.map(train, seeds):
                if found is None:
                    return
                loop, outcomes = found
                if wrong := self._note(loop, outcomes):
                    print(f"seed {loop.seed}", flush=True)
                    for arm in wrong:
                        print(f"  {arm}: {_told(outcomes[arm])}", flush=True)
                    pair = free.get()
                    yield pair, loop, wrong[0]
                    free.put(pair)
                if (now := time.monotonic()) - shown > _EVERY_S:
                    shown = now
                    print(f"{self.loops} loops in {now - began:.0f} s: {self._short()}", flush=True)
                    self.save()

    def save(self) -> None:
        """Writes it to its file, if it has one."""
        if self.path is not None:
            write_json(self.path, self.to_json())

    def _note(self, loop: Loop, outcomes: dict[str, Outcome]) -> list[str]:
        self.loops += 1
        self.last = max(self.last, loop.seed)
        kinds = {outcome.kind for outcome in outcomes.values()}
        self.outcomes[
            next((kind for kind in (*BAD[::-1], RAISED, REFUSED) if kind in kinds), EQUAL)
        ] += 1
        if RAISED not in kinds:
            self.lines.update(line.name for line in loop.lines)
        for arm, outcome in outcomes.items():
            self.by_arm.setdefault(arm, Counter())[outcome.kind] += 1
            if outcome.kind == REFUSED:
                self.sentences[_general(outcome.text)] += 1
        if RAISED in kinds:
            self.raised[_general(next(iter(outcomes.values())).text)[:160]] += 1
        wrong = [arm for arm, outcome in outcomes.items() if outcome.kind in BAD]
        if wrong:
            told = {arm: _told(outcomes[arm]) for arm in wrong}
            self.wrong.append({"seed": loop.seed, "outcomes": told})
        return wrong

    def _short(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.outcomes.most_common())

    def __str__(self) -> str:
        lines = [f"{self.loops} loops: {self._short()}"]
        lines += [f"  {arm}: {dict(counts)}" for arm, counts in self.by_arm.items()]
        lines += [f"  {count} × {text}" for text, count in self.sentences.most_common()]
        lines += [f"  DDP: {count} × {text}" for text, count in self.raised.most_common()]
        return "\n".join(lines)

    def take_up(self, data: dict[str, Any]) -> None:
        """Goes on with a record that was written, of the same ways and actions."""
        self.loops, self.last, self.wrong = data["loops"], data["last_seed"], data["wrong"]
        for found, key in (
            (self.outcomes, "outcomes"),
            (self.lines, "actions"),
            (self.sentences, "sentences"),
            (self.raised, "raised_by_ddp"),
        ):
            found.update(data[key])
        self.by_arm = {arm: Counter(counts) for arm, counts in data["by_arm"].items()}

    def to_json(self) -> dict[str, Any]:
        """The record as it is written."""
        return {
            "loops": self.loops,
            "last_seed": self.last,
            "without": list(self.without),
            "outcomes": dict(self.outcomes.most_common()),
            "by_arm": {arm: dict(counts.most_common()) for arm, counts in self.by_arm.items()},
            "actions": dict(sorted(self.lines.items())),
            "sentences": dict(self.sentences.most_common()),
            "raised_by_ddp": dict(self.raised.most_common()),
            "wrong": self.wrong,
        }


def _general(sentence: str) -> str:
    """A sentence without what it names."""
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'", "'…'", sentence.splitlines()[0]))


if __name__ == "__main__":
    sys.exit(main())

"""Injects faults into training, one after the other, and judges how all ranks end.

    python benchmarks/storm.py --faults 100 --seed 0 --jobs 3 --json benchmarks/records/storm.json

Each fault is drawn from its seed: what happens, to which of 2 to 8 ranks, in which configuration,
at which point of which step. Ranks are processes that end as scripts do, over loopback, or on
emulated hosts where something happens to a link, which needs root. Either every rank ends in time
with an error that names the rank at fault, what was trained can be saved, and nothing is left
behind; or training goes on, bit for bit as without the fault. A record is gone on with where it was
left.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # once for all ranks, which are forked
import torch.distributed.checkpoint
import torch.distributed.checkpoint.state_dict

from soonest.core.cost import Cost, Network
from soonest.core.plan import METHODS
from soonest.lab import Lab, unavailable
from soonest.lab.namespaces import path_of
from soonest.runtime.tuning import calibrate
from soonest.writing import write_json
from storm_faults import KINDS, STEPS, Ending, Fault
from storm_rank import BROKEN, MARK, TIMEOUT_S, Rank, launcher

_LATE_S = 5.0
"""After the time-out, to find out who is at fault."""
_LIMIT_S = 90.0
_LINK_BPS, _SLOW_BPS = 100e6, 5e6
_SEED_BYTES = 8
_LATE = re.compile(r"^rank \d+ took [0-9.]+ s to end: ")


@dataclass
class Outcome:
    """How one rank ended."""

    code: int | None = None
    ended: float = 0.0
    error: dict[str, Any] | None = None
    said: str = ""
    saved: bool = False
    bits: bytes | None = None


@dataclass
class Found:
    """How all ended.

    Args:
        ranks: each of them.
        happened: when the fault did, in seconds of the monotonic clock; None if it did not.
        wrong: what was left behind or damaged, in words.
        plan: that the first rank saved, in training in which nothing happened.
    """

    ranks: list[Outcome]
    happened: float | None
    wrong: str
    plan: str = ""


@cache
def _lab() -> Lab:
    """Hosts for all faults of this process."""
    return Lab(4, _LINK_BPS).__enter__()


@contextmanager
def _disturbed(fault: Fault, server: int | None) -> Iterator[Any]:
    """Gives what to call again and again once the fault has happened, with seconds since then."""
    done: list[str] = []

    def act(since_s: float) -> None:
        first, host = not done, fault.rank
        done.append("")
        if fault.kind == "store gone" and first and server is not None:
            os.kill(server, signal.SIGKILL)
        if fault.kind == "slow link" and first:
            _lab().set_link(host, _SLOW_BPS)
        if fault.kind in ("cut link", "link cut for a second") and first:
            _lab().cut(host)
        if fault.kind == "link cut for a second" and since_s > 1 and "mended" not in done:
            _lab().mend(host)
            done.append("mended")

    try:
        yield act
    finally:
        if done and KINDS[fault.kind].links:
            _lab().mend(fault.rank)
            _lab().set_link(fault.rank, _LINK_BPS)


def inject(fault: Fault, plan: str = "") -> Found:
    """Lets a fault happen.

    Args:
        fault: which.
        plan: the text of a plan that ranks may use.
    """
    folder, pids = Path(tempfile.mkdtemp()), list[int]()
    (folder / "temporary").mkdir()
    (folder / "plan").write_text(plan)
    links = KINDS[fault.kind].links
    server = None if fault.hosts_store else launcher(folder / "port")
    address = _lab().address(0) if links else "127.0.0.1"
    for me in range(fault.ranks):
        if (pid := os.fork()) == 0:
            _be_a_rank(me, fault, folder, address)
        pids.append(pid)
    found = [Outcome() for _ in pids]
    deadline, mark = time.monotonic() + _LIMIT_S, folder / MARK
    waiting, happened = dict(enumerate(pids)), None
    with _disturbed(fault, server) as disturb:
        while waiting and time.monotonic() < deadline:
            for me, pid in list(waiting.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    found[me].code = os.waitstatus_to_exitcode(status)
                    found[me].ended = time.monotonic()
                    del waiting[me]
            if happened is None and mark.exists():
                happened = time.monotonic()
            if happened is not None:
                disturb(time.monotonic() - happened)
            if fault.kind == "stop" and set(waiting) == {fault.rank}:
                break
            time.sleep(0.02)
    for pid in waiting.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if server is not None:
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    for me, one in enumerate(found):
        _read(one, me, folder)
    told = Found(found, happened, _left(folder, pids), (folder / "plan").read_text())
    shutil.rmtree(folder)
    return told


def _be_a_rank(me: int, fault: Fault, folder: Path, address: str) -> None:
    """What a forked process does, and ends."""
    os.setsid()  # so that what it starts can be found
    with open(folder / f"{me}.said", "w", encoding="utf-8") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.chdir(folder)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "temporary")
    namespace = path_of(_lab()._namespaces[me]) if KINDS[fault.kind].links else None
    Rank(me, fault, folder, address, namespace).run()
    sys.exit()


def _read(one: Outcome, me: int, folder: Path) -> None:
    """What a rank has left."""
    one.said = (folder / f"{me}.said").read_text(encoding="utf-8", errors="replace")
    error, saved, bits = (folder / f"{me}.{kind}" for kind in ("error", "saved", "bits"))
    with suppress(FileNotFoundError, json.JSONDecodeError):  # it may have ended as it wrote it
        one.error = json.loads(error.read_text())
    one.bits = bits.read_bytes() if bits.exists() else None
    with suppress(FileNotFoundError, RuntimeError, EOFError):
        values = torch.load(saved, weights_only=True).values()
        one.saved = all(value.isfinite().all() for value in values)


def _left(folder: Path, pids: Sequence[int]) -> str:
    """What should not be there any more, or is damaged."""
    left = [path.name for path in (*folder.glob("core*"), *folder.glob("temporary/*"))]
    left = [name for name in left if not name.startswith("torchinductor")]  # torch's own cache
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
            left.append(f"a process of that of {pid}")
    broken = folder / BROKEN
    words = [f"left behind: {', '.join(left)}"] if left else []
    return "; ".join([*words, *([broken.read_text()] if broken.exists() else [])])


@cache
def _reference(configuration: str, ranks: int, seed: int) -> Found:
    """The same training in which nothing happens."""
    quiet = Fault(seed, "nothing", ranks, 0, configuration, 1, "after", False)
    found = inject(quiet)
    assert found.ranks[0].bits is not None, found.ranks[0].said
    return found


def judged(fault: Fault, slack_s: float) -> str | None:
    """What is wrong with how it ended, in words; None if nothing is."""
    quiet = partial(_reference, fault.configuration, fault.ranks, fault.seed)
    found = inject(fault, quiet().plan if fault.kind == "damaged plan" else "")
    if found.wrong:
        return found.wrong
    kind = KINDS[fault.kind]
    for me, one in enumerate(found.ranks):
        if one.code is None and not (fault.kind == "stop" and me == fault.rank):
            return f"rank {me} hangs: {_end(one)}"
        if one.code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS):
            return f"rank {me} crashed: {_end(one)}"
    went_on = all(one.code == 0 for one in found.ranks)
    if kind.ending is Ending.ALIKE:
        bits = {one.bits for one in found.ranks}
        return None if went_on and len(bits) == 1 else f"not alike: {_end(found.ranks[0])}"
    if kind.ending is Ending.GOES_ON or went_on:
        for me, one in enumerate(found.ranks):
            if one.code != 0 or one.bits is None:
                return f"rank {me} did not go on: {one.code} {_end(one)}"
            if one.bits != quiet().ranks[0].bits:
                return f"rank {me} came out otherwise, silently: {_end(one)}"
        return None
    for me in range(fault.ranks):
        if me != fault.rank and (wrong := _wrong(me, found, fault, slack_s)) is not None:
            return wrong
    odd = found.ranks[fault.rank]
    if fault.kind.startswith("raise") and odd.code != 1:
        return f"the odd rank ended with {odd.code}: {_end(odd)}"
    return None


def _wrong(me: int, found: Found, fault: Fault, slack_s: float) -> str | None:
    """What is wrong with how a rank ended to which the fault did not happen."""
    kind, one = KINDS[fault.kind], found.ranks[me]
    if one.error is None:
        if fault.step >= STEPS - 2 and one.code == 0:
            return None  # it needed nothing of the other any more
        return f"rank {me} ended with {one.code} and no error: {_end(one)}"
    said = f"{one.error['name']}: {one.error['said']}"
    if kind.ending is Ending.NAMED and f"rank {fault.rank}" not in said:
        return f"rank {me} does not name the culprit: {said}"
    innocent = [r for r in range(fault.ranks) if r != fault.rank and f"rank {r} (" in said]
    if innocent and kind.ending is Ending.NAMED and not kind.others:
        return f"rank {me} blames rank {innocent[0]}: {said}"
    limit_s = TIMEOUT_S + _LATE_S + slack_s
    if found.happened is not None and one.ended - found.happened > limit_s:
        return f"rank {me} took {one.ended - found.happened:.1f} s to end: {said}"
    if not kind.at_start and not one.saved:
        return f"rank {me} lost what was trained: {_end(one)}"
    return None


def _end(one: Outcome) -> str:
    return one.said[-400:]


def _tried(seed: int, slack_s: float) -> dict[str, Any]:
    """A fault, and what came of it."""
    fault, began = Fault.drawn(seed), time.monotonic()
    if KINDS[fault.kind].links and (reason := unavailable()):
        return {**asdict(fault), "wrong": None, "skipped": reason}
    wrong = judged(fault, slack_s)
    _reference.cache_clear()
    return {**asdict(fault), "wrong": wrong, "took_s": round(time.monotonic() - began, 1)}


def _told(seeds: Sequence[int], jobs: int, slack_s: float) -> Iterator[dict[str, Any]]:
    """What came of each fault, by processes that take one after the other.

    They are forked, and nothing in them catches an error: so ranks end as scripts do.
    """
    (take, put), (hear, tell) = os.pipe(), os.pipe()
    with os.fdopen(put, "wb") as file:
        file.write(b"".join(seed.to_bytes(_SEED_BYTES) for seed in seeds))
    for _ in range(jobs):
        if os.fork() == 0:
            while seed := os.read(take, _SEED_BYTES):
                one = json.dumps(_tried(int.from_bytes(seed), slack_s))
                os.write(tell, one.encode() + b"\n")
            os._exit(0)
    os.close(tell)
    with os.fdopen(hear, encoding="utf-8") as file:
        yield from map(json.loads, file)


def _all_told(seeds: Sequence[int], jobs: int, slack_s: float) -> Iterator[dict[str, Any]]:
    """The same; if it took too long while others computed, also what comes of it alone."""
    late: dict[int, str] = {}
    for one in _told(seeds, jobs, slack_s):
        if jobs > 1 and one["wrong"] and _LATE.search(one["wrong"]):
            late[one["seed"]] = one["wrong"]
        else:
            yield one
    for one in _told(list(late), 1, slack_s):
        yield {**one, "beside_others": late[one["seed"]]}


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--seeds", type=_seeds, help="instead, with commas")
    parser.add_argument("--jobs", type=int, default=1, help="so many faults at a time")
    parser.add_argument("--slack", type=float, default=2.0, help="seconds, on a busy machine more")
    parser.add_argument("--json", type=Path, help="where the record is")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kinds = {kind for kinds in METHODS.values() for kind in kinds}
    network = Network({kind: Cost.linear(1e-3, 1e8) for kind in sorted(kinds)})
    calibrate.network_of = lambda *_, **__: network
    os.environ["SOONEST_CACHE"], os.environ["GLOO_SOCKET_IFNAME"] = "", "lo"
    gc.collect()
    gc.freeze()  # else each rank would copy it all when it ends
    faults: dict[int, dict[str, Any]] = {}
    if args.json and args.json.exists():
        faults = {one["seed"]: one for one in json.loads(args.json.read_text())["faults"]}
    wanted = args.seeds or range(args.seed, args.seed + args.faults)
    seeds = [seed for seed in wanted if seed not in faults]
    for one in _all_told(seeds, args.jobs, args.slack):
        faults[one["seed"]] = one
        when = f"{one['point']} of step {one['step']}, rank {one['rank']} of {one['ranks']}"
        words = one["wrong"] or one.get("skipped") or "well"
        print(f"{one['seed']}: {one['kind']}, {one['configuration']}, {when}: {words}", flush=True)
        if args.json:
            ordered = [faults[seed] for seed in sorted(faults)]
            wrong = sum(one["wrong"] is not None for one in ordered)
            write_json(args.json, {"timeout_s": TIMEOUT_S, "wrong": wrong, "faults": ordered})
    bad = sorted(seed for seed, one in faults.items() if one["wrong"])
    which = f": {', '.join(map(str, bad))}" if bad else ""
    print(f"{len(bad)} of {len(faults)} ended badly{which}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

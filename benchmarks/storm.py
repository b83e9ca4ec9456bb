"""Injects faults into training, one after the other, and judges how all ranks end.

    python benchmarks/storm.py --faults 100 --seed 0 --json benchmarks/records/storm.json

Each fault is drawn from its seed: what happens, to which of 2 to 4 ranks over loopback, in which
configuration, at which point of which step. Ranks are processes that end as scripts do. Either
every rank ends in time with an error that names the rank at fault, what was trained can be saved,
and nothing is left behind; or training goes on, bit for bit as without the fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # once for all ranks, which are forked
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
from torch import nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import soonest
from soonest.core.network import Cost, Network
from soonest.core.plan import METHODS
from soonest.runtime import calibrate, collectives
from soonest.writing import write_json

TIMEOUT_S = 6.0
_LATE_S = 5.0
_STEPS = 14
_START_S = 90.0
_MARK = "fault"

KILLED = ("kill", "end", "terminate")
LOST = (*KILLED, "stop", "sleep", "destroy")
RAISED = ("raise", "raise in backward", "raise in optimizer", "interrupt")
UNEVEN = ("skip step", "skip backward")
DIFFERENT = ("other model", "other option", "other rate", "other buffer")
HARMLESS = ("pause", "late", "nothing")
KINDS = (*LOST, *RAISED, *UNEVEN, *DIFFERENT, *HARMLESS)
POINTS = ("forward", "backward", "op", "step", "after")
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gather": {"method": "gather"},
    "exchange": {"method": "exchange"},
    "split": {"method": "split"},
    "sharded": {"shard_optimizer": True},
    "sharded in a ring": {"shard_optimizer": True, "method": "shard"},
    "sharded, rounded": {"shard_optimizer": True, "parameter_wire_dtype": torch.bfloat16},
    "rounded": {"wire_dtype": torch.bfloat16},
    "clipped": {},
    "accumulated": {},
    "drop-in": {},
    "drop-in, prioritized": {},
}


@dataclass(frozen=True)
class Fault:
    """What happens.

    Args:
        seed: which drew it.
        kind: of the fault.
        ranks: how many train.
        rank: to whom it happens.
        configuration: a key of ``CONFIGURATIONS``.
        step, point: when.
        hosts_store: the key-value store lives in the first rank, and not with a launcher.
    """

    seed: int
    kind: str
    ranks: int
    rank: int
    configuration: str
    step: int
    point: str
    hosts_store: bool

    @classmethod
    def drawn(cls, seed: int) -> Fault:
        dice = random.Random(seed)
        ranks = dice.choice((2, 2, 3, 3, 4))
        kind, point = dice.choice(KINDS), dice.choice(POINTS)
        configuration = dice.choice(list(CONFIGURATIONS))
        step, rank = dice.randrange(1, _STEPS - 1), dice.randrange(ranks)
        return cls(seed, kind, ranks, rank, configuration, step, point, dice.random() < 0.3)


class _Rank:
    """One rank's training.

    Args:
        me: which one.
        fault: what is to happen to one of them.
        folder: where to leave what it has to tell.
    """

    handle: soonest.Handle

    def __init__(self, me: int, fault: Fault, folder: Path) -> None:
        self._me, self._fault, self._folder = me, fault, folder
        self._odd = me == fault.rank
        self._step = 0
        self._done = False

    def run(self) -> None:
        self._join()
        try:
            self._train()
        except BaseException as error:
            found = {"name": type(error).__name__, "said": str(error), "at": time.time()}
            write_json(self._folder / f"{self._me}.error", found)
            try:
                self.handle.detach()
            except soonest.SoonestError as late:
                print(f"detach(): {late}", flush=True)
            except AttributeError:  # there has been no handle yet
                raise error from None
            torch.save(self._model.state_dict(), self._folder / f"{self._me}.saved")
            raise
        self.handle.flush()
        bits = b"".join(p.detach().numpy().tobytes() for p in self._model.parameters())
        (self._folder / f"{self._me}.bits").write_bytes(bits)

    def _join(self) -> None:
        hosts = self._fault.hosts_store
        known = self._folder / "port"
        if hosts and self._me == 0:
            self._served = _serve(known)
        while not known.exists():
            time.sleep(0.02)
        store = TCPStore("127.0.0.1", int(known.read_text()), wait_for_workers=False)
        dist.init_process_group(
            "gloo", store=store, rank=self._me, world_size=self._fault.ranks,
            timeout=timedelta(seconds=TIMEOUT_S),
        )  # fmt: skip

    def _train(self) -> None:
        fault, odd = self._fault, self._odd
        torch.manual_seed(fault.seed)
        wide = 24 + (odd and fault.kind == "other model")
        self._model = model = nn.Sequential(
            nn.Linear(16, wide),
            nn.ReLU(),
            nn.Linear(wide, 24),
            nn.BatchNorm1d(24),
            nn.Linear(24, 8),
        )
        if fault.kind == "other buffer":
            model.register_buffer("seen", torch.zeros(3 + odd))
        rate = 0.02 if odd and fault.kind == "other rate" else 0.01
        self._optimizer = optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        options = dict(CONFIGURATIONS[fault.configuration])
        if odd and fault.kind == "other option":
            options["separable"] = False
        net: nn.Module = model
        if fault.configuration.startswith("drop-in"):
            net = soonest.DistributedDataParallel(model)
            if fault.configuration != "drop-in":
                net.prioritize(optimizer, **options)
            assert net.handle is not None
            self.handle = net.handle
        else:
            self.handle = soonest.prioritize(model, optimizer, **options)
        weight: nn.Parameter = model[2].weight  # pyright: ignore[reportAssignmentType]
        weight.register_post_accumulate_grad_hook(lambda _: self._at("backward"))
        start = collectives.start

        def started(*args: Any) -> Any:
            self._at("op")
            return start(*args)

        collectives.start = started  # type: ignore[assignment]
        for self._step in range(_STEPS):
            self._one(net, optimizer)

    def _one(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        configuration, here = self._fault.configuration, self._here()
        data = torch.Generator().manual_seed(100 * self._step + self._me)
        self._at("forward")
        optimizer.zero_grad()
        for _ in range(1 + (configuration == "accumulated")):
            loss = net(torch.randn(6, 16, generator=data)).square().mean()
            if not (here and self._fault.kind == "skip backward"):
                loss.backward()
        if configuration == "clipped":
            self.handle.clip_grad_norm_(0.5)
        self._at("step")
        if here and self._fault.kind == "raise in optimizer":
            optimizer.param_groups[0]["lr"] = "fast"
        if here and self._fault.kind in UNEVEN:
            self._mark()
        if not (here and self._fault.kind == "skip step"):
            optimizer.step()
        self._at("after")

    def _here(self) -> bool:
        return self._odd and self._step == self._fault.step

    def _at(self, point: str) -> None:
        fault = self._fault
        wanted = {"raise in backward": "backward", "interrupt": "step"}.get(fault.kind, fault.point)
        if point != wanted or not self._here() or self._done:
            return
        self._done = True
        self._mark()
        _ACTS.get(fault.kind, lambda: None)()

    def _mark(self) -> None:
        (self._folder / _MARK).touch()


def _raise() -> None:
    raise KeyError("the user's own")


def _interrupt() -> None:
    """A signal whose handler raises, a little later, wherever the rank then is."""

    def handler(*_: object) -> None:
        raise RuntimeError("a worker was killed")

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


_ACTS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "end": lambda: os._exit(0),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(3 * TIMEOUT_S),
    "destroy": dist.destroy_process_group,
    "raise": _raise,
    "raise in backward": _raise,
    "interrupt": _interrupt,
    "pause": lambda: time.sleep(1),
    "late": lambda: time.sleep(TIMEOUT_S / 2),
}


def _serve(known: Path) -> Any:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    partial = known.with_suffix(".partial")
    partial.write_text(str(store.port))
    partial.rename(known)
    return store


def _launcher(known: Path) -> int:
    """A process that has the key-value store; ranks must not inherit its threads."""
    if (pid := os.fork()) == 0:
        served = _serve(known)
        while served is not None:
            time.sleep(1)
    return pid


@dataclass
class Outcome:
    """How one rank ended."""

    code: int | None = None
    ended: float = 0.0
    error: dict[str, Any] | None = None
    said: str = ""
    saved: bool = False
    bits: bytes | None = None


def inject(fault: Fault) -> tuple[list[Outcome], float | None, list[str]]:
    """How the ranks ended, when it happened, and what was left behind."""
    folder, pids = Path(tempfile.mkdtemp()), list[int]()
    (folder / "temporary").mkdir()
    server = None if fault.hosts_store else _launcher(folder / "port")
    for me in range(fault.ranks):
        if (pid := os.fork()) == 0:
            with open(folder / f"{me}.said", "w", encoding="utf-8") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            os.chdir(folder)
            tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "temporary")
            _Rank(me, fault, folder).run()
            sys.exit()
        pids.append(pid)
    found = [Outcome() for _ in pids]
    deadline, mark = time.time() + _START_S, folder / _MARK
    waiting = dict(enumerate(pids))
    while waiting and time.time() < deadline:
        for me, pid in list(waiting.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                found[me].code, found[me].ended = os.waitstatus_to_exitcode(status), time.time()
                del waiting[me]
        if fault.kind == "stop" and set(waiting) == {fault.rank}:
            break
        time.sleep(0.02)
    for pid in waiting.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if server is not None:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    for me, one in enumerate(found):
        one.said = (folder / f"{me}.said").read_text(encoding="utf-8", errors="replace")
        error, saved, bits = (folder / f"{me}.{kind}" for kind in ("error", "saved", "bits"))
        one.error = json.loads(error.read_text()) if error.exists() else None
        one.bits = bits.read_bytes() if bits.exists() else None
        if saved.exists():
            values = torch.load(saved, weights_only=True).values()
            one.saved = all(value.isfinite().all() for value in values)
    happened = mark.stat().st_mtime if mark.exists() else None
    left = [path.name for path in (*folder.glob("core*"), *folder.glob("temporary/*"))]
    left = [name for name in left if not name.startswith("torchinductor")]  # torch's own cache
    shutil.rmtree(folder)
    return found, happened, left


@cache
def _reference(configuration: str, ranks: int, seed: int) -> bytes:
    quiet = Fault(seed, "nothing", ranks, 0, configuration, 1, "after", False)
    found, _, _ = inject(quiet)
    assert found[0].bits is not None, found[0].said
    return found[0].bits


def judged(fault: Fault, slack_s: float) -> str | None:
    """What is wrong with how it ended, in words; None if nothing is."""
    found, happened, left = inject(fault)
    others = [me for me in range(fault.ranks) if me != fault.rank]
    odd = found[fault.rank]
    if left:
        return f"left behind: {left}"
    for me, one in enumerate(found):
        if one.code is None and not (fault.kind == "stop" and me == fault.rank):
            return f"rank {me} hangs: {one.said[-300:]}"
        if one.code in (-signal.SIGABRT, -signal.SIGSEGV):
            return f"rank {me} crashed: {one.said[-300:]}"
    if fault.kind in HARMLESS or all(one.code == 0 for one in found):
        expected = _reference(fault.configuration, fault.ranks, fault.seed)
        for me, one in enumerate(found):
            if one.bits != expected:
                return f"rank {me} came out otherwise, silently: {one.code} {one.said[-300:]}"
        return None
    for me in others:
        error = found[me].error
        if error is None:
            late = fault.step >= _STEPS - 2 and found[me].code == 0
            if not late:
                return (
                    f"rank {me} ended with {found[me].code} and no error: {found[me].said[-300:]}"
                )
            continue
        if f"rank {fault.rank}" not in error["said"]:
            return f"rank {me} does not name the culprit: {error['name']}: {error['said']}"
        innocent = [other for other in others if f"rank {other} (" in error["said"]]
        if innocent and fault.kind not in UNEVEN:
            return f"rank {me} blames rank {innocent[0]}: {error['said']}"
        limit_s = TIMEOUT_S + _LATE_S + slack_s
        if happened is not None and found[me].ended - happened > limit_s:
            return f"rank {me} took {found[me].ended - happened:.1f} s to end: {error['said']}"
        if fault.kind not in DIFFERENT and not found[me].saved:
            return f"rank {me} lost what was trained: {found[me].said[-300:]}"
    if fault.kind in RAISED and odd.code != 1:
        return f"the odd rank ended with {odd.code}: {odd.said[-300:]}"
    return None


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the first; the others follow")
    parser.add_argument("--slack", type=float, default=2.0, help="seconds, on a busy machine more")
    parser.add_argument("--json", type=Path, help="where to write the record")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kinds = {kind for kinds in METHODS.values() for kind in kinds}
    network = Network({kind: Cost.linear(1e-3, 1e8) for kind in sorted(kinds)})
    calibrate.network_of = lambda *_, **__: network
    os.environ["SOONEST_CACHE"], os.environ["GLOO_SOCKET_IFNAME"] = "", "lo"
    record: dict[str, Any] = {"timeout_s": TIMEOUT_S, "seed": args.seed, "faults": [], "wrong": 0}
    for seed in range(args.seed, args.seed + args.faults):
        fault, began = Fault.drawn(seed), time.monotonic()
        wrong = judged(fault, args.slack)
        took_s = round(time.monotonic() - began, 1)
        record["faults"].append({**asdict(fault), "wrong": wrong, "took_s": took_s})
        record["wrong"] += wrong is not None
        place = f"{fault.configuration}, rank {fault.rank} of {fault.ranks}, step {fault.step}"
        print(f"{seed}: {fault.kind} at {fault.point}, {place}: {wrong or 'well'}", flush=True)
        if args.json:
            write_json(args.json, record)
    print(f"{record['wrong']} of {args.faults} ended badly")
    return int(record["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

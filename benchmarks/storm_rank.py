"""One rank of the storm: trains, and has happen to it what its fault says."""

from __future__ import annotations

import atexit
import ctypes
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.checkpoint.state_dict_saver import save

import soonest
from soonest.runtime import comm
from soonest.runtime.comm import groups
from soonest.writing import write_json
from storm_faults import CONFIGURATIONS, STEPS, Fault

TIMEOUT_S = 6.0
"""Of the process group."""
MARK = "fault"
"""The file that is there once the fault has happened."""
BROKEN = "broken"
"""The file that a rank leaves which has found something of the user's damaged."""


class Rank:
    """One rank's training.

    Args:
        me: which one.
        fault: what is to happen to one of them.
        folder: where to leave what it has to tell, and where it finds the store's ``port``.
        address: where the store is.
        namespace: the file of the emulated host's network namespace that it is to live in.
    """

    def __init__(
        self, me: int, fault: Fault, folder: Path, address: str, namespace: str | None
    ) -> None:
        self._me, self._fault, self._folder = me, fault, folder
        self._address = address
        self._odd = me == fault.rank
        self._step = 0
        self._done = False
        self._handles: list[soonest.Handle] = []
        if namespace:
            _enter(namespace)
            os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
        if fault.configuration == "hierarchical":  # two to a host
            groups.host_name = lambda: f"{socket.gethostname()} {me // 2}"
        if fault.checked:
            os.environ["SOONEST_CHECK"] = "1"

    def run(self) -> None:
        """Trains to the end, or raises what has happened; leaves files that say so.

        ``RANK.bits`` has the parameters at the end, ``RANK.plan`` the plan. After an error
        ``RANK.error`` has its name and words, and ``RANK.saved`` the model, for what is not lost.
        """
        if self._fault.kind == "staggered start":
            time.sleep(random.Random(f"{self._fault.seed} {self._me}").uniform(0, 2))
        self._join()
        try:
            self._train()
            for handle in self._handles:
                handle.flush()
        except BaseException as error:
            found = {"name": type(error).__name__, "said": str(error), "at": time.monotonic()}
            write_json(self._path("error"), found)
            if not self._handles:
                raise
            for handle in self._handles:
                try:
                    handle.detach()
                except soonest.SoonestError as late:
                    print(f"detach(): {late}", flush=True)
            torch.save(self._model.state_dict(), self._path("saved"))
            raise
        bits = b"".join(p.detach().numpy().tobytes() for p in self._model.parameters())
        self._path("bits").write_bytes(bits)
        if self._me == 0 and self._fault.kind == "nothing" and self._fault.ranks > 1:
            self._handles[0].save_plan(self._folder / "plan")

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._me}.{kind}"

    def _join(self) -> None:
        known = self._folder / "port"
        if self._fault.hosts_store and self._me == 0:
            self._served = serve(known, self._address)
        while not known.exists():
            time.sleep(0.02)
        store = TCPStore(self._address, int(known.read_text()), wait_for_workers=False)
        dist.init_process_group(
            "gloo", store=store, rank=self._me, world_size=self._fault.ranks,
            timeout=timedelta(seconds=TIMEOUT_S),
        )  # fmt: skip

    # Training

    def _train(self) -> None:
        fault, odd = self._fault, self._odd
        torch.manual_seed(fault.seed)
        self._model = model = _Model(24 + (odd and fault.kind == "other model"))
        if fault.kind == "other buffer":
            model.register_buffer("seen", torch.zeros(3 + odd))
        if fault.kind == "other frozen parameter":
            model.fixed = nn.Parameter(torch.zeros(3 + odd), requires_grad=False)
        if fault.configuration == "compiled block":
            model.second = torch.compile(model.second, backend="eager")  # type: ignore[assignment]
        self._optimizers = self._made_optimizers()
        self._net = self._prioritized()
        model.second_weight.register_post_accumulate_grad_hook(lambda _: self._at("backward"))
        start = comm.start

        def started(*args: Any) -> Any:
            self._at("op")
            return start(*args)

        comm.start = started  # type: ignore[assignment]
        for self._step in range(STEPS):
            self._one()

    def _made_optimizers(self) -> list[torch.optim.Optimizer]:
        rate = 0.02 if self._odd and self._fault.kind == "other rate" else 0.01
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        if self._fault.configuration != "two optimizers":
            return [torch.optim.Adam(parameters, lr=rate)]
        return [torch.optim.Adam(parameters[:2], lr=rate), torch.optim.SGD(parameters[2:], lr=rate)]

    def _prioritized(self) -> nn.Module:
        fault, model = self._fault, self._model
        options = dict(CONFIGURATIONS[fault.configuration].options)
        if self._odd and fault.kind == "other option":
            options["separable"] = False
        if fault.kind == "damaged plan":
            plan = (self._folder / "plan").read_text()
            options["plan"] = self._folder / f"{self._me}.mine"
            options["plan"].write_text(plan[: len(plan) // 2] if self._odd else plan)
        if not fault.configuration.startswith("drop-in"):
            if len(self._optimizers) > 1:
                self._handles += soonest.prioritize(model, self._optimizers, **options)
            else:
                self._handles.append(soonest.prioritize(model, self._optimizers[0], **options))
            return model
        net = soonest.DistributedDataParallel(model)
        if fault.configuration != "drop-in":
            net.prioritize(self._optimizers[0], **options)
        assert net.handle is not None
        self._handles.append(net.handle)
        return net

    def _one(self) -> None:
        """One step."""
        kind, configuration, here = self._fault.kind, self._fault.configuration, self._here()
        data = torch.Generator().manual_seed(100 * self._step + self._me)
        self._at("forward")
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        for _ in range(1 + (configuration == "accumulated")):
            given = torch.randn(6, 16, generator=data)
            branch = configuration != "unused parameters" or (self._step + self._me) % 3 > 0
            loss = self._net(given, branch).square().mean()
            if here and kind in ("nan", "inf"):
                loss = loss * float(kind)
                self._mark()
            if not (here and kind == "skip backward"):
                loss.backward()
        if configuration == "clipped":
            self._handles[0].clip_grad_norm_(0.5)
        self._at("step")
        if here and kind == "raise in optimizer":
            self._optimizers[0].param_groups[0]["lr"] = "fast"
        if here and kind in ("skip step", "skip backward"):
            self._mark()
        if not (here and kind == "skip step"):
            for optimizer in self._optimizers:
                optimizer.step()
        self._at("after")
        self._together()

    def _together(self) -> None:
        """What all ranks do at the end of one step, and the odd one does differently."""
        kind = self._fault.kind
        if self._step != self._fault.step:
            return
        if kind == "damaged state":
            state = self._handles[0].state_dict()
            if self._odd:
                state["model"].popitem()
                self._mark()
            self._handles[0].load_state_dict(state)
        if kind.endswith("in dcp.save"):
            saved = {"training": self._handles[0], "mine": _Stateful(self._in_save)}
            save(saved, checkpoint_id=self._folder / "checkpoint")

    # The fault

    def _here(self) -> bool:
        return self._odd and self._step == self._fault.step

    def _at(self, point: str) -> None:
        if point != self._fault.point or not self._here() or self._done:
            return
        self._done = True
        act = _ACTS.get(self._fault.kind)
        if self._fault.kind in _OF_RANK:
            act = getattr(self, _OF_RANK[self._fault.kind])
        if act is not None:
            self._mark()
            act()

    def _mark(self) -> None:
        (self._folder / MARK).touch()

    def _in_save(self) -> None:
        if self._odd:
            self._mark()
            _kill() if self._fault.kind.startswith("kill") else _raise()

    def _flip_parameter(self) -> None:
        with torch.no_grad():
            _flip(self._model.second_weight)

    def _flip_state(self) -> None:
        state = self._optimizers[0].state[self._optimizers[0].param_groups[0]["params"][0]]
        with torch.no_grad():
            _flip(state["exp_avg"])

    def _kill_while_saving(self) -> None:
        """In the middle of the new file: the old one must stay."""
        path, old = self._kept()
        with _little_space(on_full=_kill):
            self._handles[0].save_plan(path)
        self._compare(path, old)

    def _fill_disk(self) -> None:
        path, old = self._kept()
        with _little_space(), suppress(OSError):
            self._handles[0].save_plan(path)
        self._compare(path, old)

    def _kept(self) -> tuple[Path, str]:
        path = self._folder / "kept"
        path.write_text("old")
        return path, "old"

    def _compare(self, path: Path, old: str) -> None:
        if path.read_text() != old:
            (self._folder / BROKEN).write_text(f"{path.name} was half written")

    def _jump(self) -> None:
        """The wall clock is set."""
        real, ahead = time.time, random.Random(self._fault.seed).choice((-86400.0, 86400.0))
        time.time = lambda: real() + ahead


class _Model(nn.Module):
    """Some layers, one of which not every pass needs."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.first = nn.Linear(16, wide)
        self.second = nn.Linear(wide, 24)
        self.second_weight: nn.Parameter
        object.__setattr__(self, "second_weight", self.second.weight)
        self.norm = nn.BatchNorm1d(24)
        self.extra = nn.Linear(24, 24)
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        x = self.norm(self.second(self.first(x).relu()))
        return self.last(self.extra(x).tanh() if branch else x)


class _Stateful:
    """Something to save that does something when it is saved."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def state_dict(self) -> dict[str, Any]:
        self._act()
        return {"number": torch.zeros(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError(f"nobody loads {list(state)}")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise KeyError("the user's own")


def _interrupt() -> None:
    """A signal whose handler raises, a little later, wherever the rank then is."""

    def handler(*_: object) -> None:
        raise RuntimeError("a worker was killed")

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _twice() -> None:
    """Ctrl-C, and once more soon after."""
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    os.kill(os.getpid(), signal.SIGINT)


def _pause() -> None:
    """SIGSTOP, and a second later SIGCONT, from a process of its own."""
    me = os.getpid()
    if os.fork() == 0:
        time.sleep(1)
        os.kill(me, signal.SIGCONT)
        os._exit(0)
    os.kill(me, signal.SIGSTOP)
    os.wait()


def _fork() -> None:
    """A process that ends as scripts do, with what they have registered for their end."""
    if (child := os.fork()) == 0:
        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(child, 0)


_ACTS: dict[str, Callable[[], object]] = {
    "kill": _kill,
    "end": lambda: os._exit(0),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(3 * TIMEOUT_S),
    "destroy": dist.destroy_process_group,
    "raise": _raise,
    "raise in backward": _raise,
    "interrupt": _interrupt,
    "out of memory": lambda: torch.empty(1 << 55),
    "Ctrl-C": lambda: os.kill(os.getpid(), signal.SIGINT),
    "Ctrl-C twice": _twice,
    "pause": lambda: time.sleep(1),
    "late": lambda: time.sleep(TIMEOUT_S / 2),
    "paused by signals": _pause,
    "fork": _fork,
    # What follows happens outside of the process, which only says when.
    "store gone": lambda: time.sleep(0.2),
    "cut link": lambda: time.sleep(0.2),
    "slow link": lambda: time.sleep(0.2),
    "link cut for a second": lambda: time.sleep(0.2),
}
_OF_RANK = {
    "flipped bit of a parameter": "_flip_parameter",
    "flipped bit of the state": "_flip_state",
    "kill while saving": "_kill_while_saving",
    "full disk": "_fill_disk",
    "clock jumps": "_jump",
}


def _flip(values: Tensor) -> None:
    """One bit of one element."""
    bits = values.detach().view(torch.int32).view(-1)
    bits[7] = bits[7] ^ (1 << 20)


@contextmanager
def _little_space(on_full: Callable[[], object] | None = None) -> Iterator[None]:
    """Files of this process cannot grow beyond some bytes, as on a disk that is full.

    Args:
        on_full: is done when one would, instead of the error of a full disk.
    """
    signal.signal(signal.SIGXFSZ, (lambda *_: on_full()) if on_full else signal.SIG_IGN)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


def _enter(namespace: str) -> None:
    """Moves this process into another network namespace."""
    file = os.open(namespace, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(file, 0):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(file)


def serve(known: Path, address: str) -> Any:
    """Makes the key-value store in this process, and lets others know its port."""
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    partial = known.with_suffix(".partial")
    partial.write_text(str(store.port))
    partial.rename(known)
    return store


def launcher(known: Path) -> int:
    """A process that has the key-value store; ranks must not inherit its threads."""
    if (pid := os.fork()) == 0:
        served = serve(known, "127.0.0.1")
        while served is not None:
            time.sleep(1)
    return pid

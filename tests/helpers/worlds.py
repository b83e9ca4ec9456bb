"""Training on ranks that are threads, with any lane, or in the plainest way there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from helpers.fake_ranks import FakeGroup, Meeting, as_threads, ranks_for
from helpers.race import FakeStreams, watched
from helpers.strategies import any_cut
from soonest.core.plan import METHODS, Plan, shards
from soonest.errors import PeerLostError, SoonestError
from soonest.runtime.comm import EXACT, Ranks
from soonest.runtime.engine.detach import detach
from soonest.runtime.engine.engine import Engine
from soonest.runtime.execute.stream_lane import StreamLane
from soonest.runtime.execute.thread_lane import ThreadLane
from soonest.runtime.flat.buffers import FlatBuffers

RANKS = 2
LANES = ("thread", "stream")


class NoStreams:
    """What a loop says of streams where there are none."""

    main = 0

    def stream(self, name: str) -> int:
        return 0

    def current(self) -> int:
        return 0

    def follow(self, stream: int, other: int) -> None: ...

    def switch(self, stream: int) -> None: ...

    @contextmanager
    def use(self, stream: int) -> Iterator[None]:
        yield


class _Cross(torch.autograd.Function):
    """Goes on on another stream, and comes back in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, streams: Any, there: int) -> Tensor:
        ctx.streams, ctx.back, ctx.there = streams, streams.current(), there
        streams.follow(there, ctx.back)
        streams.switch(there)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.streams.follow(ctx.back, ctx.there)
        ctx.streams.switch(ctx.back)
        return gradients[0], None, None


class Net(nn.Module):
    """Its middle may run on a side stream; a spare part is used only where ``spare`` says so."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.last = nn.Linear(6, 3)
        self.first = nn.Linear(4, 6)
        self.middle = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6)
        self.streams: Any = NoStreams()
        self.side: int | None = None

    def forward(self, x: Tensor, *, spare: bool = True) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.side is not None:
            home = self.streams.current()
            x = _Cross.apply(x, self.streams, self.side)  # type: ignore[assignment]
            x = _Cross.apply(torch.tanh(self.middle(x)), self.streams, home)  # type: ignore[assignment]
        else:
            x = torch.tanh(self.middle(x))
        return self.last(torch.tanh(self.spare(x)) if spare else x)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


@dataclass(frozen=True)
class Loop:
    """One way to train.

    Args:
        steps: how many.
        optimizer: makes it.
        seed: of the plan.
        sharded: the optimizer's state is shared out.
        backwards: per step, all combined.
        accumulate: backward passes before those, not combined.
        discard: one more before all, whose combined gradients are thrown away.
        spare: what says by step and rank whether the spare part is used.
        zero: gradients become "none" or "zero", "before" the forward pass or "after" the step.
        clip: gradients are clipped.
        log: where gradients are read before the step: on the "main" stream or on a "side" one.
        average: where parameters are read after it.
        late: a side stream on which parameters were read before is ordered behind the step, and
            reads one when the main stream has done so already.
        side: the middle of the model runs on a side stream.
        change: the loop goes on on another stream after the second step.
        extra: a step without a backward pass before it follows each.
        scaled: by a GradScaler.
        own: gradients are replaced by the user's own.
        touch: a parameter is changed before the step.
        state: the optimizer's state is read after each step.
    """

    steps: int = 3
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = sgd
    seed: int = 0
    sharded: bool = False
    backwards: int = 1
    accumulate: int = 0
    discard: bool = False
    spare: Callable[[int, int], bool] | None = None
    zero: str = "none before"
    clip: bool = False
    log: str = ""
    average: str = ""
    late: bool = False
    side: bool = False
    change: bool = False
    extra: bool = False
    scaled: bool = False
    own: bool = False
    touch: bool = False
    state: bool = False


@dataclass
class Seen:
    """What a rank has seen: all that it read, what the detector found, and how often streams waited
    while it trained."""

    values: list[Tensor] = field(default_factory=list[Tensor])
    races: list[str] = field(default_factory=list[str])
    host_waits: list[str] = field(default_factory=list[str])
    waits: int = 0


class Plain:
    """Training without soonest: gradients are averaged one by one after each backward pass."""

    def __init__(self, loop: Loop, model: Net, meeting: Meeting, rank: int) -> None:
        self.model, self.optimizer = model, loop.optimizer(model)
        self._meeting, self._rank = meeting, rank

    def combine(self) -> None:
        for parameter in self.model.parameters():
            gradient = parameter.grad
            used = torch.tensor(float(gradient is not None))
            if not sum(self._meeting.swap(self._rank, used)):
                continue
            mine = torch.zeros_like(parameter) if gradient is None else gradient
            every = self._meeting.swap(self._rank, mine / self._meeting.ranks)
            parameter.grad = sum(every[1:], every[0]).detach()  # type: ignore[assignment]

    def no_sync(self) -> Any:
        return nullcontext()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)

    def close(self) -> None: ...


class Soonest:
    """The same with an engine."""

    def __init__(
        self,
        loop: Loop,
        model: Net,
        meetings: Sequence[Meeting],
        rank: int,
        streams: FakeStreams | None,
    ) -> None:
        self.model, self.optimizer = model, loop.optimizer(model)
        layout = FlatBuffers(model)
        first, second = (FakeGroup(meeting, rank, streams) for meeting in meetings)
        # What a thread starts behind an op would otherwise come before the next one, or behind it.
        ranks = ranks_for(first, second if streams is None else None)
        sharing = Ranks(ranks.second, ranks.second, native=True)
        self.lane: Any = (
            StreamLane(streams, timeout_s=30, failures=FAILURES)
            if streams is not None
            else ThreadLane(timeout_s=30, failures=FAILURES)
        )
        self.sharded = loop.sharded
        self.engine = Engine(
            model,
            self.optimizer,
            separable=True,
            layout=layout,
            plan=plan_for(loop, layout),
            ranks=ranks,
            lane=self.lane,
            sharing=sharing if loop.sharded else None,
            wire=EXACT,
            failures=FAILURES,
            after_step=lambda engine: None,
        )
        self.engine.settled = True

    def combine(self) -> None: ...

    def no_sync(self) -> Any:
        return self.engine.backward.no_sync()

    def clip(self) -> None:
        if self.sharded:
            self.engine.clip_grad_norm_(0.5, 2.0, False)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)

    def close(self) -> None:
        if self.sharded:  # to hand the state back would ask for more than a fake group can do
            self.lane.close()
        else:
            detach(self.engine)


class FakeFailures:
    """Always blames the same one."""

    def cut_connections(self) -> None: ...

    def blame(self, what: str, failed: bool, error: Exception | None = None) -> str | None:
        return "rank 1 did not take part" if failed else None

    def failed(self, what: str, how: str, error: Exception, advice: str = "") -> SoonestError:
        return PeerLostError(f"{what} {how}: {self.blame(what, True)}{advice} ({error})")

    def answer(self, where: str) -> None: ...

    def tell(self, fault: str) -> None: ...

    def at_fault(self, error: Exception) -> Exception:
        return error

    @contextmanager
    def together(self, what: str, advice: str = "") -> Iterator[None]:
        yield


FAILURES: Any = FakeFailures()


def plan_for(loop: Loop, layout: FlatBuffers) -> Plan:
    random = Random(loop.seed)
    methods = [m for m in METHODS if shards(m) == loop.sharded and m != "hierarchical"]
    return Plan(RANKS, layout.flats, *any_cut(random, layout.flats, methods), random.randint(1, 3))


def train(loop: Loop, trainer: Plain | Soonest, streams: Any, rank: int) -> list[Tensor]:
    """Trains, and returns all that was read on the way and at the end."""
    model, optimizer = trainer.model, trainer.optimizer
    model.streams, side = streams, streams.stream("side")
    model.side = streams.stream("block") if loop.side else None
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=loop.scaled)
    seen: list[Tensor] = []

    def look(where: str, values: Callable[[], Sequence[Tensor]]) -> None:
        """Reads on one of the streams; whatever comes later on this one is ordered behind it."""
        here = streams.current()
        there = side if where == "side" else here
        streams.follow(there, here)
        with streams.use(there):
            seen.extend(value.detach().clone() for value in values())
        streams.follow(here, there)

    def params() -> list[nn.Parameter]:
        return list(model.parameters())

    def gradients() -> list[Tensor]:
        return [p.grad for p in params() if p.grad is not None]

    def backward(step: int, part: int) -> None:
        data = torch.Generator().manual_seed(100 * step + 10 * part + rank)
        spare = loop.spare is None or loop.spare(step, rank)
        loss = model(torch.randn(5, 4, generator=data), spare=spare).square().sum()
        scaler.scale(loss).backward()

    for step in range(loop.steps):
        how, when = loop.zero.split()
        if when == "before":
            optimizer.zero_grad(set_to_none=how == "none")
        if loop.discard:
            backward(step, 9)
            trainer.combine()
            optimizer.zero_grad(set_to_none=how == "none")
        for part in range(loop.accumulate):
            with trainer.no_sync():
                backward(step, part)
        for part in range(loop.backwards):
            backward(step, 5 + part)
            trainer.combine()
        if loop.log:
            look(loop.log, gradients)
        if loop.clip:
            trainer.clip()
        if loop.own:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad = parameter.grad * 2
        if loop.touch:
            with torch.no_grad():
                model.last.bias.mul_(0.9)
        scaler.step(optimizer)
        scaler.update()
        if loop.extra:
            optimizer.step()
        if when == "after":
            optimizer.zero_grad(set_to_none=how == "none")
        if loop.average:
            look(loop.average, params)
        if loop.late:
            here = streams.current()
            streams.follow(side, here)
            for stream in (here, side) if step else (side, here):
                with streams.use(stream):
                    seen.append(model.first.weight.detach().clone())
            streams.follow(here, side)
        if loop.state:
            look("main", lambda: [v for p in params() for v in optimizer.state[p].values()])
        if loop.change and step == 1:
            streams.follow(side, streams.current())
            streams.switch(side)
    seen.extend(p.detach().clone() for p in model.parameters())
    return seen


def plainly(loop: Loop) -> list[list[Tensor]]:
    """What each rank reads without soonest."""
    meeting = Meeting(RANKS)
    models = [Net() for _ in range(RANKS)]  # before threads share one generator of random numbers

    def each(rank: int) -> list[Tensor]:
        return train(loop, Plain(loop, models[rank], meeting, rank), NoStreams(), rank)

    return as_threads(each, RANKS)


def with_lane(
    loop: Loop,
    kind: str,
    *,
    streams: Callable[[], FakeStreams] = FakeStreams,
    before_close: Callable[[Soonest], None] | None = None,
) -> list[Seen]:
    """What each rank sees with soonest.

    Args:
        loop: how to train.
        kind: of the lane: "thread" or "stream".
        streams: makes those of a rank, for the second kind.
        before_close: called on each rank when it has trained.
    """
    meetings = [Meeting(RANKS), Meeting(RANKS)]
    models = [Net() for _ in range(RANKS)]

    def each(rank: int) -> Seen:
        fake = streams() if kind == "stream" else None
        trainer = Soonest(loop, models[rank], meetings, rank, fake)
        layout = trainer.engine.layout
        memory = [*(param.alias for param in layout.params), *layout.grads]
        watch: Any = watched(fake, *memory) if fake else nullcontext()
        try:
            with watch:
                seen = Seen(train(loop, trainer, fake or NoStreams(), rank))
            seen.waits = fake.waits if fake is not None else 0
            if before_close is not None:
                before_close(trainer)
        except BaseException:
            for meeting in meetings:
                meeting.leave()
            raise
        finally:
            trainer.close()
        if fake is not None:
            seen.races, seen.host_waits = fake.detector.races, fake.detector.host_waits
        return seen

    return as_threads(each, RANKS)


def same(loop: Loop, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether both read the same, bit by bit; norms of parts are rounded in another order."""
    exact = not (loop.sharded and loop.clip)
    return len(mine) == len(theirs) and all(
        torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(mine, theirs, strict=True)
    )

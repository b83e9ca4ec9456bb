"""What a step would take on other numbers of GPUs, in several ways of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from soonest.core.cost import Network
from soonest.core.forecast import baselines
from soonest.core.forecast.fabrics import Fabric
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.planner.planner import best_plan, flats_of
from soonest.core.simulator.simulate import step_time_s
from soonest.core.trace import Trace

HOSTS = tuple(2**power for power in range(13))
"""1 to 4096."""

WIRES = {"float32": 1.0, "bfloat16": 0.5, "float16": 0.5}
"""Types in which gradients may be sent, and the bytes as a share of the exact ones."""

SOONEST, TUNED = "soonest", "ddp-tuned"

ARMS: dict[str, str] = {
    "sequential": "layer by layer after the backward pass",
    "ddp": "DistributedDataParallel as it comes",
    "ddp-tuned": "the same with the best of several bucket sizes",
    "fsdp2": "fully_shard, best of several groups, parameters kept for the backward pass",
    "soonest": "soonest.prioritize",
}
"""The ways of training, and what they are."""

_MAX_WORK = 50_000
"""Of the search for each plan: all numbers of hosts together shall take a few seconds."""


@dataclass(frozen=True)
class Scenario:
    """What is trained on what.

    Args:
        trace: the model, as one GPU computes ``batch`` samples.
        fabric: what joins the hosts.
        gpus_per_host: the GPUs of a host share its link, and reducing among them costs nothing.
        batch: samples of the trace; None if that is unknown and does not matter.
        global_batch: samples of a step, all GPUs together; None leaves every GPU ``batch``.
        wire: a key of ``WIRES``; all ways of training send their gradients so.

    Raises:
        ValueError: a global batch without that of the trace, or an unknown wire.
    """

    trace: Trace
    fabric: Fabric
    gpus_per_host: int = 1
    batch: float | None = None
    global_batch: int | None = None
    wire: str = "float32"

    def __post_init__(self) -> None:
        if self.wire not in WIRES:
            raise ValueError(f"no wire {self.wire!r}: there are {', '.join(WIRES)}")
        if self.global_batch is not None and self.batch is None:
            raise ValueError(
                f"trace {self.trace.model!r} does not say how many samples it computes: a global "
                "batch needs --batch, the number of samples that it was recorded with"
            )

    @property
    def strong(self) -> bool:
        """Whether all GPUs together do the same work, however many they are."""
        return self.global_batch is not None

    def largest(self) -> int | None:
        """The most hosts that have work; None if any number has."""
        return None if self.global_batch is None else self.global_batch // self.gpus_per_host

    def computing(self, gpus: int) -> Trace:
        """The model as one of so many GPUs computes it, in proportion to its samples.

        Raises:
            ValueError: a GPU would get less than one sample.
        """
        if self.global_batch is None:
            return self.trace
        assert self.batch is not None
        samples = self.global_batch / gpus
        if samples < 1:
            raise ValueError(
                f"a global batch of {self.global_batch} leaves less than one sample to each of "
                f"{gpus} GPUs: give fewer --hosts or a larger --global-batch"
            )
        return slowed(self.trace, samples / self.batch)

    def network(self, hosts: int) -> Network:
        """What reducing gradients costs."""
        return self.fabric.network(hosts).slowed(WIRES[self.wire])

    @cached_property
    def single_s(self) -> float:
        """A step of one GPU alone, with the batch of one GPU; in strong scaling, with all."""
        trace = self.computing(1)
        return trace.forward_s + trace.backward_s + trace.update_us * 1e-6


@dataclass(frozen=True)
class Row:
    """What is predicted for one number of hosts.

    Args:
        hosts, gpus: how many.
        step_s: by way of training, seconds.
        bound_s: what no schedule can beat.
        compute_s: forward and backward pass alone.
        sync_s: reducing all gradients once, in one piece, with nothing else going on.
        work: how many times the work of ``single_s`` all GPUs do together in a step.
        single_s: a step of one GPU alone.
    """

    hosts: int
    gpus: int
    step_s: dict[str, float]
    bound_s: float
    compute_s: float
    sync_s: float
    work: float
    single_s: float

    def speedup(self, step_s: float) -> float:
        """Samples per second of a step so long, in units of those of one GPU alone."""
        return self.work * self.single_s / step_s

    def efficiency(self, step_s: float) -> float:
        """Speed-up per GPU, 0 to 1."""
        return self.speedup(step_s) / self.gpus

    def to_json(self) -> dict[str, Any]:
        def figures(step_s: float) -> dict[str, float]:
            return {
                "step_ms": step_s * 1e3,
                "speedup": self.speedup(step_s),
                "efficiency": self.efficiency(step_s),
            }

        return {
            "hosts": self.hosts,
            "gpus": self.gpus,
            "arms": {arm: figures(step_s) for arm, step_s in self.step_s.items()},
            "bound_ms": self.bound_s * 1e3,
            "compute_ms": self.compute_s * 1e3,
            "share_ms": self.sync_s * 1e3,
        }


def predict(scenario: Scenario, hosts: Sequence[int]) -> list[Row]:
    """A row for each number of hosts.

    Raises:
        ValueError: a number makes no sense.
    """
    return [row_of(scenario, number) for number in hosts]


def row_of(scenario: Scenario, hosts: int, arms: Sequence[str] = tuple(ARMS)) -> Row:
    """What is predicted for one number of hosts.

    Args:
        scenario: what is trained on what.
        hosts: how many.
        arms: keys of ``ARMS``.

    Raises:
        ValueError: the number makes no sense.
    """
    if hosts < 1:
        raise ValueError(f"{hosts} hosts: give one or more")
    gpus = hosts * scenario.gpus_per_host
    trace = scenario.computing(gpus)
    alone_s = trace.forward_s + trace.backward_s + trace.update_us * 1e-6
    network = scenario.network(hosts)
    costly = hosts > 1 and trace.total_bytes
    return Row(
        hosts=hosts,
        gpus=gpus,
        step_s={
            arm: _STEP_S[arm](scenario, trace, network, hosts) if costly else alone_s
            for arm in arms
        },
        bound_s=lower_bound_s(trace, network) if costly else trace.forward_s + trace.backward_s,
        compute_s=trace.forward_s + trace.backward_s,
        sync_s=network.cost_s("allreduce", trace.total_bytes) if costly else 0.0,
        work=1.0 if scenario.strong else float(gpus),
        single_s=scenario.single_s,
    )


def slowed(trace: Trace, factor: float) -> Trace:
    """A model whose computing takes so many times as long; updates do not depend on it."""
    return replace(
        trace,
        layers=tuple(
            replace(layer, fwd_us=layer.fwd_us * factor, bwd_us=layer.bwd_us * factor)
            for layer in trace.layers
        ),
    )


def _soonest(scenario: Scenario, trace: Trace, network: Network, hosts: int) -> float:
    plan = best_plan(trace, flats_of(trace), network, ranks=hosts, max_work=_MAX_WORK)
    return step_time_s(trace, plan, network)


def _fsdp2(scenario: Scenario, trace: Trace, network: Network, hosts: int) -> float:
    exact = scenario.fabric.network(hosts)
    return baselines.fsdp2_tuned(trace, network, ranks=hosts, parameters=exact).step_s


_STEP_S: dict[str, Callable[[Scenario, Trace, Network, int], float]] = {
    "sequential": lambda _, trace, net, n: baselines.sequential(trace, net, ranks=n).step_s,
    "ddp": lambda _, trace, net, n: baselines.ddp(trace, net, ranks=n).step_s,
    TUNED: lambda _, trace, net, n: baselines.ddp_tuned(trace, net, ranks=n).step_s,
    "fsdp2": _fsdp2,
    SOONEST: _soonest,
}
"""Seconds of a step, by way of training; of ``ARMS``."""

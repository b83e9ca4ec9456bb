"""What a comparison is made of; the same for every rank and every arm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from soonest.core.cost import Network
from soonest.core.forecast.baselines import SWEEP_MB
from soonest.core.plan import METHODS, shards
from soonest.core.planner.bounds import lower_bound_s
from soonest.core.trace import Trace
from soonest.lab import PAYLOAD_SHARE

ARMS: dict[str, str] = {
    "local": "no communication: the floor of compute",
    "sequential": "layer by layer after the backward pass, as in 2016",
    "ddp": "DistributedDataParallel as it comes",
    "ddp-tuned": "the same with the best of several bucket sizes",
    "ddp-zero1": "the same with ZeroRedundancyOptimizer",
    "fsdp2": "fully_shard per layer, parameters kept until the backward pass",
    "deepspeed-zero1": "DeepSpeed, ZeRO stage 1",
    "horovod": "Horovod's DistributedOptimizer",
    "soonest": "soonest.prioritize",
}
"""The ways of training that are compared if nothing else is asked for, and what they are."""

VARIANTS: dict[str, dict[str, Any]] = {
    **{
        f"soonest-{method}": {"method": method}
        | ({"shard_optimizer": True} if shards(method) else {})
        for method in METHODS
    },
    "soonest-sharded": {"shard_optimizer": True},
    "soonest-bfloat16": {"wire_dtype": "bfloat16"},
    "soonest-float16": {"wire_dtype": "float16"},
}
"""More arms of soonest's, to be asked for by name, and what each hands to ``prioritize``."""

KNOWN: dict[str, str] = ARMS | {
    arm: "soonest, " + ", ".join(f"{name}={value}" for name, value in options.items())
    for arm, options in VARIANTS.items()
}
"""All the ways of training that have a name, and what they are."""

MOMENTUM = 0.875
"""Of the SGD that trains all arms: sums of its powers are exact for a while, and it has a state."""

SWEPT = 3
"""Steps by which a bucket size is judged."""


WARM_UP = 2
"""Steps that do not count, at least."""


@dataclass(frozen=True)
class Settings:
    """All that decides what is measured.

    Args:
        trace: whose compute and sizes to replay.
        hosts: how many, one rank each.
        link_bps: of the cluster that is emulated, bits per second and direction.
        slow_motion: every time is multiplied by it.
        shrink: every size is divided by it.
        arms: names of ``KNOWN``, in the order in which they take turns; or ``module:function`` for
            one of the user's own, see ``soonest.bench.arms.Arm``.
        steps: counted, of each arm and round.
        rounds: how many turns each arm takes.
        method: by which ``soonest`` reduces every bucket; None leaves it the choice.
        overhead_s: see ``lab.replay.Replay``; measured by the ranks.
    """

    trace: Trace
    hosts: int
    link_bps: float
    slow_motion: float
    shrink: float
    arms: Sequence[str]
    steps: int = 6
    rounds: int = 2
    method: str | None = None
    overhead_s: tuple[float, float] = (0.0, 0.0)

    @property
    def shaped_bps(self) -> float:
        """Rate of the emulated links."""
        return self.link_bps / (self.slow_motion * self.shrink)

    @property
    def network(self) -> Network:
        """What reducing all gradients costs at the least, in the trace's own time."""
        return payload_network(self.hosts, self.link_bps)

    @property
    def bound_s(self) -> float:
        """What no schedule can beat, in the trace's own time.

        Updates are left out: the replay really makes them, but not in slow motion.
        """
        return lower_bound_s(replace(self.trace, update_us=0.0), self.network)

    @property
    def communication_s(self) -> float:
        """To reduce all gradients once, with nothing else going on."""
        return self.network.cost_s("allreduce", self.trace.total_bytes)

    def sweep(self) -> dict[str, tuple[float, ...]]:
        """DDP's bucket sizes that differ for this model, megabytes before shrinking.

        Of those that hold the whole model, only the smallest is left.
        """
        total_mb = self.trace.total_bytes / (1 << 20)
        above = [name for name, caps in SWEEP_MB.items() if caps[0] >= total_mb]
        return {name: caps for name, caps in SWEEP_MB.items() if name not in above[1:]}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "trace": self.trace.to_json()}

    @classmethod
    def from_json(cls, text: str) -> Settings:
        data = json.loads(text)
        lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**{**data, **lists, "trace": Trace.from_json(data["trace"])})


def payload_network(hosts: int, link_bps: float) -> Network:
    """What each op costs on such links: a ring, at the rate that TCP leaves for payload."""
    return Network.ideal(hosts, link_bps * PAYLOAD_SHARE)


def link_for(trace: Trace, hosts: int, load: float) -> float:
    """Rate of links on which reducing takes ``load`` times as long as computing, bits per second.

    Raises:
        ValueError: nothing is computed or nothing is sent, so that there is no such rate.
    """
    compute_s = trace.forward_s + trace.backward_s
    if not compute_s or not trace.total_bytes:
        raise ValueError(
            f"trace {trace.model!r} {'sends' if compute_s else 'computes'} nothing: give the rate "
            "of the links, as in --link 10gbit"
        )
    unit = payload_network(hosts, 1.0).cost_s("allreduce", trace.total_bytes)
    return unit / (load * compute_s)

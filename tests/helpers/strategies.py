"""What hypothesis draws in the tests of the core."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from hypothesis import strategies as st

from soonest.core.cost import Cost, Network
from soonest.core.plan import GATHER_PARAMETERS, METHODS, Bucket, Flat, Op, Plan, shards
from soonest.core.planner.planner import flats_of
from soonest.core.trace import Layer, Trace

_sizes = st.one_of(
    st.just(0),
    st.integers(1, 2_000),
    st.integers(10_000, 5_000_000),
)
_times = st.one_of(st.just(0.0), st.floats(1.0, 10_000.0))


@st.composite
def traces(draw: st.DrawFn, max_layers: int = 8) -> Trace:
    """A model with layers of no size, of no time, tiny ones and large ones."""
    layers = tuple(
        Layer(f"layer{i}", draw(_sizes), draw(_times), draw(_times))
        for i in range(draw(st.integers(1, max_layers)))
    )
    return Trace("drawn", layers, draw(_times))


@st.composite
def flats(draw: st.DrawFn, trace: Trace) -> tuple[Flat, ...]:
    """Flat buffers of a model: one parameter per layer, or several, in one or two dtypes."""
    if draw(st.booleans()):
        return flats_of(trace)
    halves = ([], [])
    for layer in trace.layers:
        for number in range(draw(st.integers(0, 3))):
            numel = draw(st.integers(1, 200_000))
            halves[draw(st.integers(0, 1))].append((f"{layer.name}.{number}", layer.name, numel))
    return (Flat.lay_out("float32", 4, halves[0]), Flat.lay_out("bfloat16", 2, halves[1]))


networks = st.builds(Network.linear, st.sampled_from([0.0, 1e-5, 1e-3]), st.floats(1e6, 1e10))
windows = st.integers(1, 3)
ranks = st.sampled_from([1, 2, 4, 16])


def any_step(seed: int, *, sharded: bool, ranks: int | None = None) -> tuple[Trace, Plan, Network]:
    """A model, a plan that no planner would make, and a network about as slow as its compute.

    Times are continuous, so that no two things that do not depend on each other happen at once.
    Ops of all buckets come in any order that a plan may have, some alone, by all methods.
    """
    random = Random(seed)

    def us() -> float:
        return random.choice([0.0, 0.1, 1.0, 1.0]) * random.uniform(1.0, 1000.0)

    sizes = [random.choice([0, random.randrange(1, 10_000)]) for _ in range(random.randint(1, 7))]
    layers = tuple(Layer(f"l{i}", size, us(), us()) for i, size in enumerate(sizes))
    trace = Trace("any", layers, random.choice([0.0, 1.0]) * random.uniform(1.0, 2000.0))
    flats: tuple[Flat, ...] = flats_of(trace)
    if random.random() < 0.5:  # two flat buffers, each with a part of every layer
        halves = [(f"h{i}", f"l{i}", size // 3 + 1) for i, size in enumerate(sizes) if size]
        flats = (*flats, Flat.lay_out("bfloat16", 2, halves))
    methods = [method for method in METHODS if shards(method) == sharded]
    buckets, ops = any_cut(random, flats, methods)
    pace = sum(layer.fwd_us + layer.bwd_us for layer in layers) * 1e-6 + 1e-6
    costs = {
        kind: Cost.linear(
            random.choice([0.0, 0.1]) * pace * random.random(),
            (sum(sizes) + 1) / pace * random.uniform(0.5, 20.0),
        )
        for kind in sorted({kind for kinds in METHODS.values() for kind in kinds})
    }
    ranks = ranks or random.choice([1, 2, 8])
    plan = Plan(ranks, flats, buckets, ops, random.randint(1, 4))
    return trace, plan, Network(costs)


def any_cut(
    random: Random, flats: Sequence[Flat], methods: Sequence[str]
) -> tuple[tuple[Bucket, ...], tuple[Op, ...]]:
    """Buckets and ops of a plan for these buffers, in any order that a plan may have."""
    buckets: list[Bucket] = []
    for index, flat in enumerate(flats):
        places = range(flat.align, flat.numel, flat.align)
        cuts = sorted(random.sample(places, min(len(places), random.randint(0, 4))))
        for start, stop in pairwise([0, *cuts, flat.numel] if flat.numel else []):
            carried = [s.layer for s in flat.slots if s.start < stop and start <= s.count_at]
            buckets.append(
                Bucket(index, start, stop, random.choice(methods), tuple(dict.fromkeys(carried)))
            )
    left = [(bucket, list(METHODS[entry.method])) for bucket, entry in enumerate(buckets)]
    ops: list[Op] = []
    while left:
        combining = [entry for entry in left if entry[1][0] != GATHER_PARAMETERS]
        bucket, kinds = random.choice(combining or left)
        ops.append(Op(bucket, kinds.pop(0), random.random() < 0.2))
        left = [entry for entry in left if entry[1]]
    return tuple(buckets), tuple(ops)

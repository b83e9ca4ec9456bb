"""What hypothesis draws in the tests of the core."""

from hypothesis import strategies as st

from soonest.core.network import Network
from soonest.core.plan import Flat
from soonest.core.planner import flats_of
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

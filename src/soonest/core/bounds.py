"""What no schedule can beat."""

from __future__ import annotations

from soonest.core.network import Network
from soonest.core.trace import Trace


def lower_bound_s(trace: Trace, network: Network) -> float:
    """Seconds that no step is shorter than, whatever is cut, fused, reordered or preempted.

    A step runs from the start of a backward pass to the end of the forward pass after it, so it
    takes at least F + B, the computation alone. Layer i has a *head* r_i = sum of b_j over j >= i
    before its gradient is ready, a *body* p_i of transfer on the one network, and a *tail*
    q_i = sum of f_j over j >= i of forward computation that needs its parameters. This is the
    one-machine problem 1 | r_i, q_i, pmtn | Cmax. Any set S of layers needs

        min r over S  +  sum of p over S  +  min q over S

    because its transfers start after the first of its gradients is ready, cannot overlap, and the
    layer that lands last still has its tail before it. The maximum over all S is attained by
    Jackson's preemptive schedule, so no better bound exists for preemptive transfers (J. Carlier,
    "The one-machine sequencing problem", European Journal of Operational Research 11, 1982).

    Here heads and tails agree: both fall from layer to layer. If k is the last layer in S, both
    minima belong to k, and S = {1..k} has the largest sum. So the maximum over all sets is

        max over k of  C(1..k) + sum over i >= k of (f_i + b_i)

    Two refinements hold for every schedule, too. The first transfer of a set starts a latency after
    its gradients are ready at the earliest; all others may hide theirs. And updates start after the
    backward pass, as ``optimizer.step()`` is called then, run one after the other, and are over for
    layers 1..k before the forward pass of layer k starts. With u_i = update of layer i, B = sum of
    all b_i and a = latency the bound is

        max over k of  max(a + C(1..k) + head_k + tail_k,  B + sum over i <= k of u_i + tail_k)

    and F + B. Padding and the latency of all ops but one are left out: they only make steps longer.

    Args:
        trace: the model; the time of an update is shared out by bytes.
        network: what combining costs; the best of all methods counts, in latency and per byte.

    Returns:
        Seconds.
    """
    bound = trace.forward_s + trace.backward_s
    update_per_byte = trace.update_us * 1e-6 / max(1, trace.total_bytes)
    transfer = update = 0.0
    for layer, head, tail in zip(trace.layers, trace.ready_s(), trace.tail_s(), strict=True):
        if not layer.bytes:
            continue  # It neither sends nor waits.
        transfer += layer.bytes * network.s_per_byte
        update += layer.bytes * update_per_byte
        sent = head + network.latency_s + transfer
        bound = max(bound, sent + tail, trace.backward_s + update + tail)
    return bound

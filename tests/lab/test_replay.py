import sys
import time

import pytest
import torch

from soonest.core.trace import Layer, Trace
from soonest.lab import Loopback
from soonest.lab.pace import Pace
from soonest.lab.replay import Replay
from soonest.lab.replay_layer import LR

TRACE = Trace(
    "small",
    (
        Layer("input", 0, 100.0, 200.0),
        Layer("large", 4 * 5000, 300.0, 100.0),
        Layer("free", 4 * 100, 0.0, 0.0),
        Layer("one", 4, 100.0, 100.0),
        Layer("loss", 0, 0.0, 50.0),
    ),
)

DDP = """
import os, sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from soonest.core.trace import Layer, Trace
from soonest.lab.replay import Replay

dist.init_process_group("gloo")
trace = Trace("t", tuple(Layer(f"l{i}", 4 * 700 * (i + 1), 10.0, 10.0) for i in range(4)))
replay = Replay(trace, momentum=0.75, check=True)
ddp = DistributedDataParallel(replay, gradient_as_bucket_view=True, bucket_cap_mb=0.01)
optimizer = replay.sgd()


def step():
    loss = ddp(None)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(replay.verify() is None)


for _ in range(5):
    step()
with ddp.no_sync():
    step()
dist.destroy_process_group()
# Now and then torch aborts when the interpreter ends, which is not looked at here.
sys.stdout.flush()
os._exit(0)
"""


def train(replay, steps):
    optimizer = replay.sgd()
    for _ in range(steps):
        loss = replay(torch.zeros(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def as_rank(rank, ranks, **options):
    replay = Replay(TRACE, slow_motion=1e-3, alone=True, **options)
    for layer in replay.layers:
        layer.rank, layer.ranks = rank, ranks
    return replay


def gradients(replay):
    replay.zero_grad()
    replay(None).backward()
    return [parameter.grad for parameter in replay.parameters()]


def test_one_parameter_per_layer_with_bytes():
    replay = Replay(TRACE, shrink=10)
    sizes = {name: weight.numel() for name, weight in replay.named_parameters()}
    assert sizes == {"layers.1.weight": 500, "layers.2.weight": 10, "layers.3.weight": 1}
    assert {weight.dtype for weight in replay.parameters()} == {torch.float32}
    assert len(replay.layers) == len(TRACE.layers)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9375])
@pytest.mark.parametrize("steps", [0, 1, 2, 40])
def test_parameters_are_exact_after_any_number_of_steps(momentum, steps):
    replay = Replay(TRACE, slow_motion=1e-3, momentum=momentum, check=True)
    train(replay, steps)
    assert replay.steps == steps
    assert replay.verify() is None
    assert replay.verify(steps + 1) is not None


def test_verify_names_layer_and_element():
    replay = Replay(TRACE, slow_motion=1e-3)
    train(replay, 3)
    with torch.no_grad():
        replay.layers[1].weight[1234] += LR
    wrong = replay.verify()
    assert wrong is not None
    assert "1 of 5000 elements" in wrong
    assert "layer large" in wrong
    assert "number 1234" in wrong


def test_verify_sees_a_slice_in_a_wrong_place():
    replay = Replay(TRACE, slow_motion=1e-3)
    train(replay, 1)
    with torch.no_grad():
        weight = replay.layers[1].weight
        weight[:2048] = weight[2048:4096].clone()
    assert replay.verify() is not None


def test_a_forward_pass_that_reads_an_old_parameter_is_noticed():
    replay = Replay(TRACE, slow_motion=1e-3, check=True)
    train(replay, 2)
    old = replay.layers[1].weight.detach().clone()
    train(replay, 1)
    replay.layers[1].weight.data.copy_(old)
    with pytest.raises(RuntimeError, match="not there yet"):
        replay(None)


def test_sums_in_16_bits_are_right_within_their_rounding():
    dtype = torch.bfloat16
    replays = [
        as_rank(rank, 16, momentum=0.875, rounding=torch.finfo(dtype).eps / 2) for rank in range(16)
    ]
    first = replays[0]
    optimizer = first.sgd()
    for _ in range(60):
        every = [gradients(replay) for replay in replays]
        for index, parameter in enumerate(first.parameters()):
            shares = [(every[rank][index] / 16).to(dtype) for rank in range(16)]
            parameter.grad = sum(shares[1:], shares[0]).float()
        optimizer.step()
    assert first.verify() is None
    with torch.no_grad():
        first.layers[1].weight[7] *= 2
    assert "1 of 5000 elements" in str(first.verify())
    for layer in first.layers:
        layer.rounding = 0.0
    assert first.verify() is not None


@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_the_mean_over_ranks_is_what_one_rank_alone_makes(ranks):
    alone = Replay(TRACE, slow_motion=1e-3, momentum=0.75)
    replays = [as_rank(rank, ranks, momentum=0.75) for rank in range(ranks)]
    for _ in range(5):
        expected = gradients(alone)
        every = [gradients(replay) for replay in replays]
        for index, want in enumerate(expected):
            total = torch.zeros_like(want)
            for rank in reversed(range(ranks)):
                total += every[rank][index] / ranks
            assert torch.equal(total, want)


def test_gradients_differ_by_rank_step_and_layer():
    replays = [as_rank(rank, 4) for rank in range(4)]
    seen = [
        [float(replay.layers[layer].weight.grad[0]) for layer in (1, 2, 3)]
        for _ in range(10)
        for replay in replays
        if gradients(replay)
    ]
    for column in range(3):
        assert len({row[column] for row in seen}) > 10
    assert sum(len(set(row)) == 1 for row in seen) < 5


def test_autograd_takes_the_gradient_without_a_copy(monkeypatch):
    made = []
    replay = Replay(TRACE, slow_motion=1e-3)
    layer = replay.layers[1]
    compute = layer.compute_backward

    def spy():
        gradient = compute()
        made.append(gradient.data_ptr())
        return gradient

    monkeypatch.setattr(layer, "compute_backward", spy)
    replay(None).backward()
    assert made == [layer.weight.grad.data_ptr()]


class Clock:
    """Sleeps that take too long, in a time that passes only by them and by work."""

    def __init__(self, monkeypatch, overshoot_s):
        self.now_s = 0.0
        self.overshoot_s = overshoot_s
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, length_s):
        self.now_s += length_s + self.overshoot_s


def test_late_sleeps_are_made_up_for(monkeypatch):
    clock = Clock(monkeypatch, overshoot_s=0.3e-3)
    pace = Pace()
    for number in range(1000):
        began_s = clock.now_s
        clock.now_s += 0.05e-3
        pace.fill(0.1e-3 * (number % 5), began_s)
    assert clock.now_s == pytest.approx(0.2, rel=0.01)


def test_every_layer_takes_its_times_whether_it_has_parameters_or_not(monkeypatch):
    clock = Clock(monkeypatch, overshoot_s=0.0)
    replay = Replay(TRACE, slow_motion=100)
    loss = replay(None)
    assert clock.now_s == pytest.approx(0.05)
    loss.backward()
    assert clock.now_s == pytest.approx(0.05 + 0.045)


def test_real_time_is_about_what_was_asked():
    replay = Replay(TRACE, slow_motion=100)
    began_s = time.perf_counter()
    for _ in range(3):
        replay(None).backward()
    assert 0.98 < (time.perf_counter() - began_s) / (3 * 0.095) < 1.5


def test_no_layer_with_bytes_and_no_time_is_fine():
    replay = Replay(Trace("nothing", (Layer("a", 0, 0.0, 0.0), Layer("b", 0, 0.0, 0.0))))
    replay(None).backward()
    assert list(replay.parameters()) == []
    assert replay.steps == 1
    assert replay.verify() is None


@pytest.mark.parametrize("ranks", [2, 3])
def test_ddp_gets_it_right_and_a_step_that_is_not_shared_shows(ranks):
    lines = [[] for _ in range(ranks)]
    command = [sys.executable, "-c", DDP]
    on_line = lambda rank, line: lines[rank].append(line)  # noqa: E731
    assert Loopback(ranks).run(command, on_line=on_line, timeout_s=200) == 0, lines
    assert lines == [["True"] * 5 + ["False"]] * ranks


@pytest.mark.parametrize(
    "options", [{"slow_motion": 0}, {"shrink": -1}, {"momentum": 0.9}, {"momentum": 1.0}]
)
def test_what_makes_no_sense_is_refused(options):
    with pytest.raises(ValueError, match="must be"):
        Replay(TRACE, **options)

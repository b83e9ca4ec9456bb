"""Plans take turns in a running job, the fastest stays, and changes are noticed."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import run_ranks
from helpers.steering import Steered
from soonest.core.plan import Plan
from soonest.runtime.guard import pending
from soonest.runtime.tuning import drift


def like_ddp_is_fastest(step: int, plan: Plan) -> float:
    return 0.1 if plan.blocking else 0.3


def like_ddp_is_slowest(step: int, plan: Plan) -> float:
    return 0.3 if plan.blocking else 0.1


def fewer_are_faster(step: int, plan: Plan) -> float:
    return 0.1 * len(plan.buckets) + plan.blocking


def buckets_of(steered: Steered) -> list[int]:
    return [len(plan.buckets) for plan in steered.plans]


def takes_turns() -> tuple[list[int], list[bool], list[bool]]:
    steered = Steered(fewer_are_faster)
    steered.settle()
    steered.train(5)
    return buckets_of(steered), [plan.blocking for plan in steered.plans], steered.settled


def test_two_ranks_try_a_plan_like_ddps_and_coarser_ones() -> None:
    first, second = run_ranks(takes_turns, 2)
    assert first == second
    buckets, blocking, settled = first
    usual = buckets[0]
    assert buckets[:8] == [usual] * 8, "observed, then measured"
    had = buckets[8::4]
    two = had.index(2, 2)
    assert all(buckets[8 + 4 * i : 12 + 4 * i] == [had[i]] * 4 for i in range(two + 2))
    assert had[0] == 1, "that of DDP"
    assert two in (3, 4), "behind the searched one and, if it differs, all-reduce alone"
    assert 2 < had[two - 1] < usual
    assert had[two + 1] == 1
    assert blocking == [False] * 8 + [True] * 4 + [False] * (len(blocking) - 12)
    assert buckets[-6:] == [1] * 6, "the fastest stays"
    assert settled == [False] * (len(settled) - 6) + [True] * 6


def logged() -> dict[str, Any]:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.getLogger("soonest")
    logger.addHandler(Listener(logging.INFO))
    logger.setLevel(logging.INFO)
    steered = Steered(like_ddp_is_fastest)
    steered.settle()
    report = steered.handle.report()
    assert report is not None
    plan = steered.handle.plan
    assert plan is not None
    return {
        "said": said,
        "history": steered.handle.history,
        "noted": report.notes,
        "plan": plan.to_json(),
        "fingerprint": plan.fingerprint,
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_if_what_ddp_does_is_faster_it_is_done_and_said_why(ranks: int) -> None:
    first, *others = run_ranks(logged, ranks)
    plan = Plan.from_json(first["plan"])
    assert plan.blocking
    reached = max(bucket.stop for bucket in plan.buckets)
    backward = [plan.buckets[op.bucket].stop for op in plan.ops]
    assert backward == sorted(backward, reverse=True), "in the order of a backward pass"
    assert backward[0] == reached
    begun, order, stays = first["said"]
    assert f" on {ranks} ranks: " in begun
    assert "the first step showed the order of use" in order
    assert f"plan {first['fingerprint'][:8]} instead of " in stays
    assert "waiting in step() takes 100 ms a step" in stays
    assert "the usual cut 300 ms" in stays
    assert first["history"] == (order, stays)
    assert first["noted"][-3:-1] == (order, stays)
    for other in others:
        assert other["said"] == [], "the first rank speaks for all"
        assert other["history"] == first["history"]


def waits(sharded: bool, fastest: bool) -> tuple[bool, int, bool]:
    """After a step: whether values are in flight, how many hooks there are, and are they right."""
    steered = Steered(
        like_ddp_is_fastest if fastest else like_ddp_is_slowest, shard_optimizer=sharded
    )
    steered.settle()
    engine = steered.handle._engine
    assert engine is not None
    assert engine.bound_plan.plan.sharded == sharded
    engine.profiler.attention.closely = lambda: False  # type: ignore[method-assign]
    steered.train(3)
    parameters = list(steered.model.parameters())
    flying = any(pending.is_pending(p) for p in parameters)
    hooks = sum(bool(module._forward_pre_hooks) for module in steered.model)
    with pending.DisableGuard():
        early = [p.detach().clone() for p in parameters]
    steered.handle.flush()
    alike = all(torch.equal(a, b) for a, b in zip(early, parameters, strict=True))
    return flying, hooks, alike


@pytest.mark.parametrize("sharded", [False, True])
def test_a_plan_like_ddps_waits_in_step_and_leaves_nothing_in_flight(sharded: bool) -> None:
    assert run_ranks(waits, 2, sharded, True) == [(False, 0, True)] * 2
    for flying, hooks, _ in run_ranks(waits, 2, sharded, False):
        assert flying, "which other plans do"
        assert hooks == 4


def remembers(folder: str, faster: int, steps: int) -> tuple[dict[str, Any], list[Any], str]:
    """Trains while plans with so many buckets seem to be the fastest."""
    os.environ["SOONEST_CACHE"] = folder

    def step_s(step: int, plan: Plan) -> float:
        return 0.1 + 0.01 * abs(len(plan.buckets) - faster) + 0.001 * plan.blocking

    steered = Steered(step_s)
    steered.train(steps)
    cuts = [[(b.start, b.stop, b.method) for b in plan.buckets] for plan in steered.plans]
    return steered.values(), cuts, steered.handle.history[-1]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_three_ranks_repeat_the_turns_of_the_run_before_and_its_choice(tmp_path: Path) -> None:
    here, elsewhere = str(tmp_path / "here"), str(tmp_path / "elsewhere")
    values, cuts, why = run_ranks(remembers, 3, here, 2, 75)[0]
    again, same_cuts, remembered = run_ranks(remembers, 3, here, 30, 75)[0]
    assert len(cuts[-1]) == 2, "the fastest by measurement"
    assert len({len(cut) for cut in cuts}) > 2, "several took turns"
    assert same_cuts == cuts
    assert same(values, again)
    assert "as remembered" in remembered
    assert "as remembered" not in why
    others, other_cuts, _ = run_ranks(remembers, 3, elsewhere, 30, 75)[0]
    assert other_cuts != cuts, "without that memory times decide"
    assert not same(values, others), "and with them rounding"


def test_what_a_run_that_was_ended_early_has_measured_counts(tmp_path: Path) -> None:
    folder = str(tmp_path)
    _, cuts, _ = run_ranks(remembers, 3, folder, 2, 20)[0]
    _, later, _ = run_ranks(remembers, 3, folder, 30, 75)[0]
    _, again, why = run_ranks(remembers, 3, folder, 2, 75)[0]
    assert later[:20] == cuts
    assert again == later
    assert "as remembered" in why


def goes_on(folder: str, sharded: bool, before: int | None) -> tuple[Any, int, str]:
    """Trains for ten steps from where an earlier run was killed, or to there and on.

    Args:
        before: steps that the earlier run has made; None in that run itself.

    Returns:
        Parameters at the end, how many steps came before the last ten, and the last reason.
    """
    os.environ["SOONEST_CACHE"] = folder

    def step_s(step: int, plan: Plan) -> float:
        return 0.1 + 0.01 * abs(len(plan.buckets) - 2) + 0.001 * plan.blocking

    steered = Steered(step_s, shard_optimizer=sharded)
    file = Path(folder) / f"saved-{dist.get_rank()}"
    if before is None:
        steered.settle()
        steered.train(3)
        torch.save(steered.handle.state_dict(), file)
    else:
        steered.skip(before)
        steered.handle.load_state_dict(torch.load(file))
    before = before or len(steered.plans)
    steered.train(10)
    steered.handle.flush()
    return steered.values(), before, steered.handle.history[-1]


@pytest.mark.parametrize("sharded", [False, True])
def test_killed_and_resumed_three_ranks_round_as_if_they_had_gone_on(
    sharded: bool, tmp_path: Path
) -> None:
    folder = str(tmp_path)
    values, steps, _ = run_ranks(goes_on, 3, folder, sharded, None)[0]
    resumed, _, why = run_ranks(goes_on, 3, folder, sharded, steps)[0]
    assert "since training is resumed" in why
    assert same(resumed, values)
    for memory in tmp_path.glob("choice-*.json"):
        memory.unlink()
    unaware, _, _ = run_ranks(goes_on, 3, folder, sharded, steps)[0]
    assert not same(unaware, values), "the cut matters"


def other_input(folder: str, batch: int) -> int:
    """How many memories there are after a step with batches of this size."""
    os.environ["SOONEST_CACHE"] = folder
    steered = Steered(like_ddp_is_fastest)
    steered.model(torch.randn(batch, 8)).sum().backward()
    steered.optimizer.step()
    steered.handle.flush()
    dist.barrier()
    return len(list(Path(folder).glob("turns-*.json")))


def test_another_batch_size_is_another_job(tmp_path: Path) -> None:
    for batch, memories in ((4, 1), (4, 1), (8, 2)):
        assert set(run_ranks(other_input, 3, str(tmp_path), batch)) == {memories}


@pytest.mark.parametrize("folder", ["", "/proc/nowhere"])
def test_without_a_memory_three_ranks_try_nothing_that_changes_numbers(folder: str) -> None:
    first, other = (run_ranks(remembers, 3, folder, faster, 30)[0] for faster in (2, 30))
    for values, cuts, _ in (first, other):
        assert all(cut == cuts[1] for cut in cuts[1:])
        assert same(values, first[0])


def drifts(factor: float, noise: float) -> dict[str, Any]:
    """Steps change some time after the plan has settled; those of each plan alike."""
    drift._WINDOW, drift._FIRST, drift._PAUSE = 8, 32, 64  # it has its own tests
    draw = torch.Generator().manual_seed(0)
    changed: list[int] = []

    def step_s(step: int, plan: Plan) -> float:
        after = bool(changed) and step > changed[0]
        jitter = 1 + noise * float(torch.rand((), generator=draw))
        return (0.3 if plan.blocking != after else 0.1) * (factor if after else 1.0) * jitter

    steered = Steered(step_s)
    steered.settle()
    settled = len(steered.plans)
    if factor != 1.0:
        changed.append(settled + 40)
    steered.train(300)
    return {
        "history": [line.removeprefix("step ") for line in steered.handle.history],
        "settled": steered.settled[settled - 1 :],
        "blocking": (steered.plans[settled].blocking, steered.plans[-1].blocking),
        "cuts": {plan.buckets for plan in steered.plans[settled:]},
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_steps_that_change_for_good_are_planned_for_once_more(ranks: int) -> None:
    first, *others = run_ranks(drifts, ranks, 3.0, 0.1)
    _, _, noticed, again = first["history"]
    assert "times as long as before, so plan anew" in noticed
    assert "waiting in step() takes" in again
    assert first["blocking"] == (False, True)
    unsettled = [step for step, settled in enumerate(first["settled"]) if not settled]
    assert unsettled[0] == 96, "noticed when ranks compare for the second time"
    assert unsettled == list(range(96, 96 + len(unsettled))), "once"
    assert len(unsettled) <= 4 + 6 * 3 * 4
    if ranks > 2:
        assert len(first["cuts"]) == 1, "which changes no number"
    for other in others:
        assert other["history"] == first["history"]
        assert other["settled"] == first["settled"]


def test_jitter_is_not_planned_for() -> None:
    for rank in run_ranks(drifts, 2, 1.0, 0.3):
        assert len(rank["history"]) == 2
        assert all(rank["settled"])

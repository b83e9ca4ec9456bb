"""What the demo concludes from what the ranks tell."""

from typing import Any

import pytest

from soonest.core.timeline import Span, Timeline
from soonest.demo.result import Result
from soonest.demo.settings import ARMS, COMPARED, RANKS, Settings
from soonest.demo.show import summary
from soonest.lab.messages import heard, tell


def step_s(arm: str, step: int) -> float | None:
    """The first turn is slow, and the first step of each is not timed."""
    if step % 2 == 0:
        return None
    return {"ddp": 0.6, "ddp-small": 0.5, "soonest": 0.4}[arm] + (1.0 if step < 2 else 0.0)


def messages(steps: int = 6, *, settled_at: int = 2) -> list[tuple[int, dict[str, Any]]]:
    told: list[tuple[int, dict[str, Any]]] = []
    for rank in range(RANKS):
        for arm in COMPARED:
            told += [
                (rank, {
                    "kind": "step", "arm": arm, "loss": (1 / (1 + step + rank)).hex(),
                    "seconds": step_s(arm, step), "settled": step >= settled_at,
                })
                for step in range(steps)
            ]  # fmt: skip
            trained = {"kind": "trained", "arm": arm, "checksum": "abc", "test_nats": 2.0}
            told.append((rank, trained))
    return told


def result_of(told: list[tuple[int, dict[str, Any]]]) -> Result:
    settings = Settings(steps=6, turn=2)
    result = Result(settings, compute_s=0.3, gradient_bytes=4000, link_bps=8e4)
    for rank, message in told:
        result.take(rank, message)
    return result


def test_equal_runs_are_identical():
    result = result_of(messages())
    assert result.differences() == []
    lines = "\n".join(summary(result))
    assert "Identical to the last bit: all 12 losses" in lines
    assert "NOT" not in lines


def test_the_loss_on_held_out_text_is_told_in_bits():
    """2 nats are 2 / ln 2 = 2.885 bits; the mean over the ranks counts."""
    told = messages()
    assert result_of(told).test_bits == pytest.approx(2.88539)
    for rank, message in told:
        if message["kind"] == "trained" and message["arm"] == "soonest":
            message["test_nats"] = 1.0 + 2.0 * rank / (RANKS - 1)
    result = result_of(told)
    assert result.test_bits == pytest.approx(2.88539)
    assert "Held-out text: 2.89 bits per byte" in "\n".join(summary(result))


def test_the_last_bit_of_one_loss_is_a_difference():
    told = messages()
    rank, message = [(r, m) for r, m in told if (r, m["arm"]) == (1, "soonest")][3]
    value = float.fromhex(message["loss"])
    message["loss"] = (value + 2**-54).hex()
    assert float.fromhex(message["loss"]) != value
    [difference] = result_of(told).differences()
    assert f"rank {rank}: the losses differ from step 4 on" in difference
    assert "NOT IDENTICAL" in "\n".join(summary(result_of(told)))


@pytest.mark.parametrize("arm", COMPARED)
@pytest.mark.parametrize("rank", range(RANKS))
def test_other_parameters_are_a_difference(arm: str, rank: int):
    told = messages()
    for who, message in told:
        if (who, message["kind"], message["arm"]) == (rank, "trained", arm):
            message["checksum"] = "xyz"
    [difference] = result_of(told).differences()
    assert "parameters differ" in difference
    assert f"xyz ({ARMS[arm]} on rank {rank})" in difference


def test_a_run_that_stopped_early_is_a_difference():
    last = (1 / (1 + 5 + 1)).hex()
    told = [(rank, m) for rank, m in messages() if rank == 0 or m.get("loss") != last]
    assert result_of(told).differences() == ["rank 1 did not finish all steps of both"]
    told = [(rank, m) for rank, m in messages() if m["kind"] == "step"]
    told += [(0, m) for rank, m in messages() if m["kind"] == "trained" and rank == 0]
    assert "none" in result_of(told).differences()[0]


def test_step_times_leave_out_the_first_turn():
    result = result_of(messages())
    assert result.step_ms("ddp") == pytest.approx(600)
    assert result.step_ms("soonest") == pytest.approx(400)
    assert result.step_ms("ddp-small") is None
    assert result.speedup("soonest") == pytest.approx(1.5)
    assert result.speedup("ddp-small") is None


def test_step_times_leave_out_the_turns_in_which_plans_take_turns():
    told = messages(settled_at=4)
    for _, message in told:
        if message["kind"] == "step" and message["seconds"] and message["seconds"] < 1:
            message["seconds"] += 0.1
            break
    assert result_of(told).step_ms("ddp") == pytest.approx(600), "the slower step came before"
    assert "from step 5 on" in "\n".join(summary(result_of(told)))
    never = messages(settled_at=100)
    assert result_of(never).step_ms("soonest") == pytest.approx(400), "or there would be nothing"
    assert "still on trial" in "\n".join(summary(result_of(never)))


def test_the_bound_comes_from_the_layers_and_the_link():
    result = result_of(messages())
    assert result.bound_ms is None
    spans = (
        Span("compute", "backward", "b", 0.0, 0.1),
        Span("compute", "backward", "a", 0.1, 0.2),
        Span("compute", "forward", "a", 0.5, 0.55),
        Span("compute", "forward", "b", 0.55, 0.6),
    )
    timeline = Timeline("ddp", 0.6, spans).to_json()
    told = {"kind": "timeline", "arm": "ddp", "timeline": timeline}
    result.take(0, {**told, "layer_bytes": {"a": 1000, "b": 3000}})
    # At 80 kbit/s, b takes 0.3 s and a 0.1 s: b's gradient is ready after 0.1 s, then both go out,
    # and at least b's forward pass comes after.
    assert result.bound_ms == pytest.approx(1e3 * (0.1 + 0.4 + 0.05))
    result.link_bps = None
    assert result.bound_ms is None


def test_all_of_it_is_json():
    import json

    figures = json.loads(json.dumps(result_of(messages()).to_json()))
    assert figures["identical"] is True
    assert figures["arms"]["ddp"]["step_ms"] == pytest.approx(600)
    assert figures["arms"]["soonest"]["step_ms_all"] == pytest.approx([1400, 400, 400])
    assert figures["speedup"] == pytest.approx(1.5)


def test_messages_arrive_among_other_output(capsys: pytest.CaptureFixture[str]):
    tell("step", arm="ddp", loss=(0.1).hex())
    line = capsys.readouterr().out.rstrip("\n")
    assert heard(line) == {"kind": "step", "arm": "ddp", "loss": (0.1).hex()}
    assert heard("UserWarning: something") is None
    assert heard("") is None

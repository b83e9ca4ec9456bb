"""``soonest predict`` from end to end."""

import json
from pathlib import Path

import pytest

from soonest.cli import main
from soonest.core.cost import Network
from soonest.core.trace import Trace

LINK = ["--link", "25gbit", "--latency", "11us"]
ALEXNET = ["predict", "--trace", "alexnet"]


def test_figures_words_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    figures, picture = tmp_path / "p.json", tmp_path / "p.png"
    out = ["--json", str(figures), "--picture", str(picture)]
    assert main([*ALEXNET, "--hosts", "64,1,16", *LINK, *out]) == 0
    data = json.loads(figures.read_text())
    assert [row["hosts"] for row in data["rows"]] == [1, 16, 64]
    for row in data["rows"]:
        assert {"sequential", "ddp", "ddp-tuned", "fsdp2", "soonest"} == set(row["arms"])
        assert all(arm["step_ms"] >= row["bound_ms"] for arm in row["arms"].values())
    assert data["advice"]["limit"] == "bandwidth"
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "Time of a step, ms" in said
    assert "On 64 GPUs the rate of the links limits the step" in said
    assert "What would help most" in said


def test_up_to_4096_by_default_or_as_far_as_the_batch_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    figures = tmp_path / "p.json"
    words = ["predict", "--model", "bert-base", "--tflops", "60", "--fabric", "100gbe"]
    assert main([*words, "--json", str(figures)]) == 0
    hosts = [row["hosts"] for row in json.loads(figures.read_text())["rows"]]
    assert hosts == [2**power for power in range(13)]
    assert main([*words, "--json", str(figures), "--global-batch", "40"]) == 0
    hosts = [row["hosts"] for row in json.loads(figures.read_text())["rows"]]
    assert hosts == [1, 2, 4, 8, 16, 32]
    assert "Computing is taken to shrink" in capsys.readouterr().out


def test_from_a_profile_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace, network = Trace.load("vgg16"), Network.ideal(4, 10e9)
    profile = tmp_path / "run.json"
    content = {**trace.to_json(), "ranks": 4, "network": network.to_json()}
    profile.write_text(json.dumps(content))
    assert main(["predict", "--profile", str(profile), "--hosts", "2,4"]) == 0
    assert "network as measured on 4 ranks" in capsys.readouterr().out
    calibration = tmp_path / "network.json"
    calibration.write_text(json.dumps(network.to_json()))
    asked = [*ALEXNET, "--hosts", "2", "--network", str(calibration)]
    assert main([*asked, "--ranks", "4"]) == 0
    assert main(asked) == 2
    assert "give --ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["predict", *LINK], "one of the arguments --trace --profile --model is required"),
        (["predict", "--trace", "nosuch", *LINK], "no trace 'nosuch'"),
        (["predict", "--profile", "nosuch.json", *LINK], "handle.save_profile"),
        (["predict", "--model", "nosuch", "--tflops", "9", *LINK], "no model 'nosuch': there are"),
        (["predict", "--model", "vgg16", *LINK], "--model needs --tflops"),
        ([*ALEXNET, "--tflops", "9", *LINK], "--tflops is for --model"),
        (ALEXNET, "no network: give --link RATE, --fabric NAME"),
        ([*ALEXNET, *LINK, "--fabric", "25gbe"], "not allowed with argument --link"),
        ([*ALEXNET, "--fabric", "nosuch"], "no fabric 'nosuch': there are 1gbe"),
        ([*ALEXNET, "--fabric", "25gbe", "--latency", "1us"], "--latency is for --link"),
        ([*ALEXNET, *LINK, "--ranks", "4"], "--ranks is for --network"),
        ([*ALEXNET, "--link", "25gbit", "--latency", "soon"], "'soon' is no duration"),
        ([*ALEXNET, "--network", "nosuch.json"], "cannot read nosuch.json"),
        ([*ALEXNET, *LINK, "--hosts", "0"], "0 is too few"),
        ([*ALEXNET, *LINK, "--hosts", "1,many"], "'many' is not a whole number"),
        ([*ALEXNET, *LINK, "--wire", "int8"], "no wire 'int8'"),
        ([*ALEXNET, *LINK, "--batch", "32"], "recorded with 64 samples, not 32"),
        ([*ALEXNET, *LINK, "--hosts", "64", "--global-batch", "32"], "less than one sample"),
        ([*ALEXNET, *LINK, "--hosts", "4", "--picture", "x.png"], "two numbers of hosts or more"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_2(
    argv: list[str], says: str, capsys: pytest.CaptureFixture[str]
):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("soonest: ")
    assert err.count("\n") == 1
    assert says in err


def test_a_link_carries_its_headers_too(capsys: pytest.CaptureFixture[str]):
    """Of 1514 bytes in a frame 1448 are payload: 9.56 of 10 Gbit/s."""
    assert main([*ALEXNET, "--hosts", "2", "--link", "10gbit", "--latency", "11us"]) == 0
    said = capsys.readouterr().out
    assert "links that carry 9.56 Gbit/s of payload and 11 µs a message" in said

"""``soonest predict``: what more machines would give."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soonest.cli.request import (
    NO_PICTURES,
    WrongRequestError,
    at_least,
    duration,
    factor,
    new_file,
    rate,
)
from soonest.writing import write_json

if TYPE_CHECKING:
    from soonest.core.forecast.advice import Advice
    from soonest.core.forecast.fabrics import Fabric
    from soonest.core.forecast.predict import Row, Scenario
    from soonest.core.trace import Trace

_LATENCY_S = 15e-6
_BATCH = 32


def add_to(commands: Any) -> None:
    predict = commands.add_parser(
        "predict",
        help="predict step times on 1 to 4096 GPUs",
        description="Predicts by simulation what a step would take on other numbers of GPUs, with "
        "soonest and in other ways of training, and says what limits it and what would help.",
    )
    what = predict.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", metavar="NAME|FILE", help="a model that was measured")
    what.add_argument(
        "--profile", type=Path, metavar="FILE", help="what handle.save_profile wrote in a real job"
    )
    what.add_argument(
        "--model", metavar="NAME", help="a model whose layers are only counted; needs --tflops"
    )
    predict.add_argument(
        "--tflops", type=factor, metavar="T", help="with --model: what a GPU sustains, TFLOP/s"
    )
    predict.add_argument(
        "--batch",
        type=at_least(1),
        metavar="B",
        help=f"samples per GPU: of the trace, if it does not say so; of --model ({_BATCH})",
    )
    where = predict.add_mutually_exclusive_group()
    where.add_argument("--link", type=rate, metavar="RATE", help="of every host, e.g. 25gbit")
    where.add_argument("--fabric", metavar="NAME", help="a well-known network, e.g. 25gbe")
    where.add_argument(
        "--network", type=Path, metavar="FILE", help="a calibration, or the profile of another job"
    )
    predict.add_argument(
        "--latency",
        type=duration,
        metavar="TIME",
        help=f"with --link: of a message, e.g. 11us ({_LATENCY_S * 1e6:g}us)",
    )
    predict.add_argument(
        "--ranks",
        type=at_least(2),
        metavar="N",
        help="with --network: how many ranks measured it, if it does not say so",
    )
    predict.add_argument(
        "--hosts", type=_numbers, metavar="N,N,...", help="how many (1,2,4,8,...,4096)"
    )
    predict.add_argument(
        "--gpus-per-host",
        type=at_least(1),
        default=1,
        metavar="G",
        help="they share its link, and reducing among them costs nothing (%(default)s)",
    )
    predict.add_argument(
        "--global-batch",
        type=at_least(1),
        metavar="N",
        help="samples of a step on all GPUs together; by default every GPU keeps its batch",
    )
    predict.add_argument(
        "--wire",
        default="float32",
        metavar="TYPE",
        help="in which gradients are sent, in all ways of training: float32, bfloat16, float16 "
        "(%(default)s)",
    )
    predict.add_argument("--json", type=new_file, metavar="FILE", help="write the figures here")
    predict.add_argument("--picture", type=new_file, metavar="PNG", help="draw them here")
    predict.set_defaults(run=run)


def _numbers(text: str) -> list[int]:
    """Numbers of hosts such as ``1,16,64``, each once and ascending."""
    return sorted({at_least(1)(number) for number in text.split(",")})


def run(args: argparse.Namespace) -> int:
    if args.picture and find_spec("matplotlib") is None:
        raise WrongRequestError(NO_PICTURES)
    from soonest.core.forecast.advice import advise
    from soonest.core.forecast.predict import predict

    try:
        scenario = _scenario(args)
        hosts = _hosts(args, scenario)
        if args.picture and len(hosts) < 2:
            raise ValueError("nothing to draw: a curve needs two numbers of hosts or more")
        rows = predict(scenario, hosts)
        advice = advise(scenario, rows)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    _show(scenario, rows, advice)
    if args.json:
        figures = {
            "trace": scenario.trace.model,
            "network": scenario.fabric.words,
            "gpus_per_host": scenario.gpus_per_host,
            "global_batch": scenario.global_batch,
            "wire": scenario.wire,
            "rows": [row.to_json() for row in rows],
            "advice": advice.to_json(),
        }
        write_json(args.json, figures)
        print(f"The figures are in {args.json}")
    if args.picture:
        from soonest.report import scaling

        drawn = scaling.draw(rows, args.picture, title=_title(scenario))
        print(f"They are drawn in {drawn}")
    return 0


def _scenario(args: argparse.Namespace) -> Scenario:
    from soonest.core.forecast.predict import Scenario

    trace, batch = _trace(args)
    return Scenario(
        trace,
        _fabric(args, trace),
        gpus_per_host=args.gpus_per_host,
        batch=batch,
        global_batch=args.global_batch,
        wire=args.wire,
    )


def _trace(args: argparse.Namespace) -> tuple[Trace, float | None]:
    """The model, and how many samples it computes."""
    from soonest.core.forecast import models
    from soonest.core.trace import Trace

    if args.model:
        if args.tflops is None:
            raise WrongRequestError(
                "--model needs --tflops, what one GPU really sustains, e.g. 60: a third to a half "
                "of what its data sheet says"
            )
        batch = args.batch or _BATCH
        return models.trace_of(args.model, tflops=args.tflops, batch=batch), batch
    if args.tflops is not None:
        raise WrongRequestError("--tflops is for --model: a trace has times of its own")
    if args.profile and not args.profile.is_file():
        raise WrongRequestError(
            f"no profile {args.profile}: let a job write one with handle.save_profile(path)"
        )
    trace = Trace.load(args.profile or args.trace)
    known = trace.info.get("batch_size")
    if args.batch and known and args.batch != known:
        raise WrongRequestError(
            f"trace {trace.model!r} was recorded with {known} samples, not {args.batch}: leave out "
            "--batch, or give --global-batch"
        )
    return trace, known or args.batch


def _fabric(args: argparse.Namespace, trace: Trace) -> Fabric:
    from soonest.core.forecast import fabrics

    if args.latency is not None and args.link is None:
        raise WrongRequestError("--latency is for --link: other networks have one of their own")
    if args.ranks is not None and args.network is None:
        raise WrongRequestError("--ranks is for --network: leave it out")
    if args.fabric:
        return fabrics.named(args.fabric)
    if args.link:
        latency_s = _LATENCY_S if args.latency is None else args.latency
        return fabrics.Links(args.link * fabrics.TCP_SHARE, latency_s)
    if args.network:
        return fabrics.Calibrated.from_json(_read(args.network), ranks=args.ranks)
    if "network" in trace.info:
        return fabrics.Calibrated.from_json(trace.info)
    raise WrongRequestError(
        "no network: give --link RATE, --fabric NAME, or --network FILE of a calibration"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WrongRequestError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise WrongRequestError(f"{path} is no JSON: give a calibration or a profile") from None
    if not isinstance(data, dict):
        raise WrongRequestError(f"{path} is no calibration: that is a JSON object")
    return data


def _hosts(args: argparse.Namespace, scenario: Scenario) -> list[int]:
    """Those asked for; by default all that have work."""
    from soonest.core.forecast.predict import HOSTS

    most = scenario.largest()
    return args.hosts or [n for n in HOSTS if most is None or n <= max(1, most)]


def _show(scenario: Scenario, rows: list[Row], advice: Advice) -> None:
    from soonest.report import scaling_text

    print(_title(scenario))
    print(f"Network: {scenario.fabric.words}.")
    if "source" in scenario.trace.info:
        print(f"Model: {scenario.trace.info['source']}.")
    print()
    for line in scaling_text.table(rows):
        print(line)
    print()
    for sentence in advice.words:
        print(sentence)
    if scenario.strong:
        print(
            "Computing is taken to shrink with the samples of a GPU; real ones need enough of them."
        )


def _title(scenario: Scenario) -> str:
    trace = scenario.trace
    per = f"{scenario.batch:g} samples per GPU" if scenario.batch else "the same work on every GPU"
    work = f"{scenario.global_batch} samples on all GPUs together" if scenario.strong else per
    wire = "" if scenario.wire == "float32" else f", gradients sent in {scenario.wire}"
    return f"{trace.model}, {work}, {scenario.fabric.title}{wire}"

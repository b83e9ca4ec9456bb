"""``soonest caffe``: Caffe's command line, trained with soonest."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soonest.cli import caffe_tools
from soonest.cli.request import WrongRequestError, at_least


def add_to(commands: Any) -> None:
    caffe = commands.add_parser(
        "caffe",
        help="train, test and time nets of Caffe",
        description="Runs nets and solvers of Caffe, with Caffe's files, results and log lines. "
        "Under torchrun or 'soonest lab run', train is data-parallel: batch_size is that of each "
        "rank.",
    )
    verbs = caffe.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(verbs)
    _add_test(verbs)
    _add_time(verbs)
    caffe_tools.add_to(verbs)


def _add_train(verbs: Any) -> None:
    train_ = verbs.add_parser(
        "train", help="train a net", description="Trains a net as a solver's prototxt says."
    )
    train_.add_argument("--solver", "-solver", metavar="PROTOTXT", help="the solver (required)")
    train_.add_argument(
        "--weights",
        "-weights",
        metavar="CAFFEMODEL,...",
        help="start from these, layers by name",
    )
    train_.add_argument(
        "--snapshot", "-snapshot", metavar="SOLVERSTATE", help="go on from this state"
    )
    train_.add_argument(
        "--global-batch",
        action="store_true",
        help="batch_size is that of all ranks together, not of each",
    )
    for name, effect in (("sigint", "stop"), ("sighup", "snapshot")):
        train_.add_argument(
            f"--{name}_effect",
            f"-{name}_effect",
            choices=("snapshot", "stop", "none"),
            default=effect,
            help=f"what {name.upper()} does (%(default)s; stop takes a snapshot, too)",
        )
    _add_state(train_)
    train_.set_defaults(run=train)


def _add_test(verbs: Any) -> None:
    test_ = verbs.add_parser("test", help="test a net", description="Scores a net with weights.")
    test_.add_argument("--model", "-model", metavar="PROTOTXT", help="the net (required)")
    test_.add_argument("--weights", "-weights", metavar="CAFFEMODEL,...", help="(required)")
    _add_iterations(test_)
    _add_state(test_)
    test_.set_defaults(run=test)


def _add_time(verbs: Any) -> None:
    time_ = verbs.add_parser(
        "time", help="time a net", description="Measures each layer, forward and backward."
    )
    time_.add_argument("--model", "-model", metavar="PROTOTXT", help="the net (required)")
    time_.add_argument("--weights", "-weights", metavar="CAFFEMODEL,...", help="start from these")
    time_.add_argument(
        "--phase", "-phase", choices=("TRAIN", "TEST"), default="TRAIN", help="(%(default)s)"
    )
    _add_iterations(time_)
    _add_state(time_)
    time_.set_defaults(run=time)


def _add_iterations(verb: Any) -> None:
    verb.add_argument(
        "--iterations",
        "-iterations",
        type=at_least(1),
        default=50,
        metavar="N",
        help="how many batches (%(default)s)",
    )


def _add_state(verb: Any) -> None:
    verb.add_argument(
        "--gpu", "-gpu", metavar="ID", help="taken for Caffe's sake; this version runs on CPUs"
    )
    verb.add_argument(
        "--level", "-level", type=int, default=0, metavar="N", help="for rules (%(default)s)"
    )
    verb.add_argument("--stage", "-stage", metavar="A,B,...", help="for rules")


def train(args: argparse.Namespace) -> int:
    if not args.solver:
        raise WrongRequestError("give the solver to train with: --solver=solver.prototxt")
    if args.weights and args.snapshot:
        raise WrongRequestError(
            "give --snapshot to go on from a state, or --weights to start from them, but not both"
        )
    try:
        from soonest.caffe import definition, signals
        from soonest.caffe.log import silent, to_stderr
        from soonest.caffe.ranks import joined
        from soonest.caffe.training import Trainer

        solver = definition.read_solver(args.solver)
        _name_snapshots(solver, Path(args.solver))
        if args.level:
            solver.put("train_state").level = args.level
        solver.put("train_state").stage += _listed(args.stage)
        with joined() as (rank, ranks):
            requests = signals.Requests(ranks)
            say = to_stderr if rank == 0 else silent
            _say_device(args, say)
            trainer = Trainer(
                solver,
                rank=rank,
                ranks=ranks,
                divide=args.global_batch,
                say=say,
                requests=requests,
            )
            if args.snapshot:
                trainer.resume(args.snapshot)
            own = [] if args.snapshot else list(solver.weights)
            trainer.finetune(_listed(args.weights or ",".join(own)))
            say("Starting Optimization")
            effects = {"sigint": args.sigint_effect, "sighup": args.sighup_effect}
            # To the very end: a second Ctrl-C must not cut off what is being saved.
            with signals.caught(requests, **effects), contextlib.closing(trainer):
                trainer.solve()
                say("Optimization Done.")
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def test(args: argparse.Namespace) -> int:
    if not args.model or not args.weights:
        raise WrongRequestError(
            "give a net and its weights: --model=net.prototxt --weights=net.caffemodel"
        )
    try:
        from soonest.caffe.log import to_stderr
        from soonest.caffe.scoring import score

        _say_device(args, to_stderr)
        with contextlib.closing(_net(args, "TEST")) as net:
            score(net, args.iterations, say=to_stderr)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def time(args: argparse.Namespace) -> int:
    if not args.model:
        raise WrongRequestError("give a net: --model=net.prototxt")
    try:
        from soonest.caffe.log import to_stderr
        from soonest.caffe.timing import measure

        _say_device(args, to_stderr)
        with contextlib.closing(_net(args, args.phase)) as net:
            measure(net, args.iterations, say=to_stderr)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def _net(args: argparse.Namespace, phase: str) -> Any:
    from soonest.caffe import definition, weights
    from soonest.caffe.message import Message
    from soonest.caffe.net import Net
    from soonest.caffe.trained import copy_weights

    state = Message("NetState", phase=phase, level=args.level, stage=_listed(args.stage))
    net = Net(definition.read_net(args.model), phase, state=state, file=args.model)
    for path in _listed(args.weights):
        copy_weights(net, weights.read(path), file=path)
    return net


def _name_snapshots(solver: Any, path: Path) -> None:
    """Without a prefix, or with one that is a folder, files are named like the solver."""
    if not solver.has("snapshot_prefix"):
        solver.snapshot_prefix = str(path.with_suffix(""))
    elif Path(solver.snapshot_prefix).is_dir():
        solver.snapshot_prefix = str(Path(solver.snapshot_prefix) / path.stem)


def _say_device(args: argparse.Namespace, say: Callable[[str], None]) -> None:
    say("Use CPU." + (" GPUs are not supported: --gpu is not used." if args.gpu else ""))


def _listed(text: str | None) -> list[str]:
    return [one.strip() for one in (text or "").split(",") if one.strip()]

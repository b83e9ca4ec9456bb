"""``soonest caffe``: Caffe's command line, trained with soonest."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soonest.cli import caffe_tools
from soonest.cli.caffe_flags import add_logging, logger, spelled, truth
from soonest.cli.request import Parser, WrongRequestError, at_least

VERSION = "1.0.0"
"""Of Caffe, whose files and results these are."""


def add_to(commands: Any) -> None:
    # Its words are parsed by a parser of its own, as flags may stand before the command.
    caffe = commands.add_parser(
        "caffe", help="train, test and time nets of Caffe", add_help=False, prefix_chars="\0"
    )
    caffe.add_argument("words", nargs="*")
    caffe.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs a command of Caffe."""
    program, verbs = _parser()
    args = program.parse_args(spelled(args.words, verbs))
    if args.version:
        print(f"caffe version {VERSION}")
        return 0
    if args.verb is None:
        raise WrongRequestError(f"give a command: {', '.join(verbs)} (see 'soonest caffe --help')")
    from soonest.caffe.io import log

    try:
        with log.to(logger(args)):
            return args.run_verb(args)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None


def _parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of Caffe's command line, and those of its commands."""
    program = Parser(
        prog="soonest caffe",
        description="Runs nets and solvers of Caffe, with Caffe's files, results and log lines. "
        "Under torchrun or 'soonest lab run', train is data-parallel: batch_size is that of each "
        "rank. Flags may stand before the command and behind it, with one dash or two.",
        allow_abbrev=False,
    )
    program.add_argument("--version", action="store_true", help="say which Caffe this is like")
    verbs = program.add_subparsers(title="commands", metavar="COMMAND", dest="verb")
    made = {
        name: verbs.add_parser(name, help=help_, description=description, allow_abbrev=False)
        for name, help_, description in (
            ("train", "train a net", "Trains a net as a solver's prototxt says."),
            ("test", "test a net", "Scores a net with weights."),
            ("time", "time a net", "Measures each layer, forward and backward."),
            ("device_query", "say which GPUs there are", "Says which GPUs there are."),
        )
    }
    for (name, verb), function in zip(made.items(), (train, test, time, device_query), strict=True):
        _add_flags(verb, name)
        verb.set_defaults(run_verb=function)
    made["leveldb_to_lmdb"] = convert = verbs.add_parser(
        "leveldb_to_lmdb",
        help="make an LMDB of a LevelDB",
        description="Makes an LMDB with the records of a LevelDB; needs plyvel.",
    )
    convert.add_argument("source", metavar="LEVELDB")
    convert.add_argument("target", metavar="LMDB", help="a new folder")
    convert.set_defaults(run_verb=convert_leveldb)
    made.update(caffe_tools.added(verbs))
    for verb in made.values():
        add_logging(verb)
        verb.add_argument("--version", action="store_true", default=argparse.SUPPRESS,
                          help=argparse.SUPPRESS)  # fmt: skip
    return program, made


def _add_flags(parser: argparse.ArgumentParser, verb: str) -> None:
    """Caffe's flags: as there, each command takes those of the others, too, and leaves them."""

    def add(name: str, verbs: str, help_: str, **more: Any) -> None:
        shown = verb in verbs.split()
        parser.add_argument(f"--{name}", help=help_ if shown else argparse.SUPPRESS, **more)

    add("solver", "train", "the solver (required)", metavar="PROTOTXT")
    add("model", "test time", "the net (required)", metavar="PROTOTXT")
    add("weights", "train test time", "required" if verb == "test" else "start from these, layers "
        "by name", metavar="CAFFEMODEL,...")  # fmt: skip
    add("snapshot", "train", "go on from this state", metavar="SOLVERSTATE")
    add("global-batch", "train", "batch_size is that of all ranks together, not of each",
        type=truth, default=False, metavar="BOOL")  # fmt: skip
    for name, effect in (("sigint", "stop"), ("sighup", "snapshot")):
        add(
            f"{name}_effect",
            "train",
            f"what {name.upper()} does (%(default)s; stop takes a snapshot, too)",
            choices=("snapshot", "stop", "none"),
            default=effect,
        )
    add("iterations", "test time", "how many batches (%(default)s)", type=at_least(1), default=50,
        metavar="N")  # fmt: skip
    add("phase", "time", "%(default)s", choices=("TRAIN", "TEST"), default="TRAIN")
    add("gpu", "train test time device_query", "taken for Caffe's sake; this version runs on CPUs",
        metavar="ID")  # fmt: skip
    add("level", "train test time", "for rules (%(default)s)", type=int, default=0, metavar="N")
    add("stage", "train test time", "for rules", metavar="A,B,...")


def train(args: argparse.Namespace) -> int:
    if not args.solver:
        raise WrongRequestError("give the solver to train with: --solver=solver.prototxt")
    if args.weights and args.snapshot:
        raise WrongRequestError(
            "give --snapshot to go on from a state, or --weights to start from them, but not both"
        )
    from soonest.caffe.io import prototxt
    from soonest.caffe.io.log import silent, to_stderr
    from soonest.caffe.solver import signals
    from soonest.caffe.solver.ranks import joined
    from soonest.caffe.solver.training import Trainer

    solver = prototxt.read_solver(args.solver)
    _name_snapshots(solver, Path(args.solver))
    if args.level:
        solver.put("train_state").level = args.level
    solver.put("train_state").stage += _listed(args.stage)
    # Signals are caught to the very end: a second Ctrl-C must not cut off what is being saved.
    with contextlib.ExitStack() as end, joined() as (rank, ranks):
        requests = signals.Requests(ranks)
        say = to_stderr if rank == 0 else silent
        _say_device(args, say)
        trainer = Trainer(
            solver, rank=rank, ranks=ranks, divide=args.global_batch, say=say, requests=requests
        )
        if args.snapshot:
            trainer.resume(args.snapshot)
        own = [] if args.snapshot else list(solver.weights)
        trainer.finetune(_listed(args.weights or ",".join(own)))
        say("Starting Optimization")
        end.enter_context(
            signals.caught(requests, sigint=args.sigint_effect, sighup=args.sighup_effect)
        )
        with contextlib.closing(trainer):
            trainer.solve()
            say("Optimization Done.")
    return 0


def test(args: argparse.Namespace) -> int:
    if not args.model or not args.weights:
        raise WrongRequestError(
            "give a net and its weights: --model=net.prototxt --weights=net.caffemodel"
        )
    from soonest.caffe.io.log import to_stderr
    from soonest.caffe.solver.scoring import score

    _say_device(args, to_stderr)
    with contextlib.closing(_net(args, "TEST")) as net:
        score(net, args.iterations, say=to_stderr)
    return 0


def time(args: argparse.Namespace) -> int:
    if not args.model:
        raise WrongRequestError("give a net: --model=net.prototxt")
    from soonest.caffe.io.log import to_stderr
    from soonest.caffe.solver.timing import measure

    _say_device(args, to_stderr)
    with contextlib.closing(_net(args, args.phase)) as net:
        measure(net, args.iterations, say=to_stderr)
    return 0


def device_query(args: argparse.Namespace) -> int:
    import torch

    from soonest.caffe.io.log import to_stderr

    to_stderr(f"Querying GPUs {args.gpu or ''}")
    there = torch.cuda.device_count()
    for number in range(there) if args.gpu == "all" else map(int, _listed(args.gpu)):
        if not 0 <= number < there:
            raise WrongRequestError(f"there is no GPU {number}: there are {there}")
        found = torch.cuda.get_device_properties(number)
        to_stderr(f"Device id:                     {number}")
        to_stderr(f"Major revision number:         {found.major}")
        to_stderr(f"Minor revision number:         {found.minor}")
        to_stderr(f"Name:                          {found.name}")
        to_stderr(f"Total global memory:           {found.total_memory}")
        to_stderr(f"Number of multiprocessors:     {found.multi_processor_count}")
    return 0


def convert_leveldb(args: argparse.Namespace) -> int:
    from soonest.caffe.data.stores import leveldb_to_lmdb
    from soonest.caffe.io.log import to_stderr

    count = leveldb_to_lmdb(args.source, args.target)
    to_stderr(f"Wrote {count} records to {args.target}")
    return 0


def _net(args: argparse.Namespace, phase: str) -> Any:
    from soonest.caffe.io import prototxt, weights
    from soonest.caffe.net.net import Net
    from soonest.caffe.net.trained import copy_weights
    from soonest.caffe.proto.message import Message

    state = Message("NetState", phase=phase, level=args.level, stage=_listed(args.stage))
    net = Net(prototxt.read_net(args.model), phase, state=state, file=args.model)
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

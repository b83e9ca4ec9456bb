"""``soonest caffe``'s companions: the programs that come with Caffe, under their names there."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from soonest.cli.caffe_flags import truth
from soonest.cli.request import Parser, WrongRequestError, at_least

Run = Callable[[argparse.Namespace], int]


def added(verbs: Any) -> dict[str, Parser]:
    """Adds the parser of each program to those of ``soonest caffe``, and returns them by name."""

    def add(name: str, run: Run, help_: str, description: str) -> Parser:
        made[name] = verbs.add_parser(name, help=help_, description=description, allow_abbrev=False)
        made[name].set_defaults(run_verb=run)
        return made[name]

    made: dict[str, Parser] = {}
    _images(
        add(
            "convert_imageset",
            convert_imageset,
            "make a data base of images",
            "Makes a data base of the images that a list names, each with its label.",
        )
    )
    verb = add(
        "compute_image_mean",
        compute_image_mean,
        "compute the mean image of a data base",
        "Writes the mean of all images of a data base, and says that of each channel.",
    )
    verb.add_argument("source", metavar="INPUT_DB")
    verb.add_argument("target", metavar="OUTPUT_FILE", nargs="?", default="", help="binaryproto")
    _backend(verb)
    _features(
        add(
            "extract_features",
            extract_features,
            "write blobs of a net to data bases",
            "Runs a net in the phase TEST and writes some of its blobs to data bases.",
        )
    )
    for name, what in (
        ("upgrade_net_proto_text", "the definition of a net"),
        ("upgrade_net_proto_binary", "a caffemodel"),
        ("upgrade_solver_proto_text", "a solver"),
    ):
        help_ = f"bring {what} to today's form"
        verb = add(name, upgrade, help_, f"Brings {what} of any age to today's form.")
        verb.add_argument("source", metavar="OLD")
        verb.add_argument("target", metavar="NEW")
    verb = add(
        "draw_net",
        draw_net,
        "draw a net",
        "Draws a net as .svg; as .png, .pdf and others if graphviz is installed.",
    )
    verb.add_argument("source", metavar="PROTOTXT")
    verb.add_argument("target", metavar="PICTURE")
    for name, choices in (
        ("rankdir", ("LR", "TB", "RL", "BT")),
        ("phase", ("ALL", "TRAIN", "TEST")),
    ):
        verb.add_argument(f"--{name}", choices=choices, default=choices[0], help="(%(default)s)")
    verb = add(
        "parse_log",
        parse_log,
        "make tables and a picture of a training's log",
        "Writes LOG.train and LOG.test, tables of what a log says, and LOG.png, a picture of "
        "losses and accuracies.",
    )
    verb.add_argument("log", metavar="LOG")
    verb.add_argument("folder", metavar="FOLDER", help="to write to")
    verb.add_argument("--delimiter", default=",", help="between numbers (%(default)s)")
    verb.add_argument("--verbose", action="store_true", help="taken for Caffe's sake")
    verb = add(
        "convert",
        convert,
        "turn a net into a module of plain torch",
        "Writes TARGET.py, a module that needs torch and nothing else, and TARGET.pt, its weights; "
        "then runs both beside the net.",
    )
    verb.add_argument("--to", choices=("torch",), default="torch", help="(%(default)s)")
    verb.add_argument("net", metavar="PROTOTXT")
    verb.add_argument("trained", metavar="CAFFEMODEL")
    verb.add_argument("target", metavar="TARGET", help="without an ending")
    return made


def _images(verb: Parser) -> None:
    verb.add_argument("root", metavar="ROOTFOLDER/", help="what stands before each name")
    verb.add_argument("list", metavar="LISTFILE", help="a name, a space and a label in each line")
    verb.add_argument("target", metavar="DB_NAME", help="the new data base")
    for name, help_ in (
        ("gray", "one channel, not three"),
        ("shuffle", "leave the order to chance"),
        ("check_size", "make sure that all have one size"),
        ("encoded", "store the files as they are"),
    ):
        verb.add_argument(f"--{name}", type=truth, default=False, metavar="BOOL", help=help_)
    verb.add_argument("--encode_type", default="", metavar="TYPE", help="store as png, jpg, …")
    for name in ("width", "height"):
        verb.add_argument(
            f"--resize_{name}", type=at_least(0), default=0, metavar="PIXELS",
            help=f"bring to this {name} (both, or none)",
        )  # fmt: skip
    _backend(verb)


def _backend(verb: Parser) -> None:
    kinds = ("lmdb", "leveldb")
    verb.add_argument(
        "--backend", choices=kinds, default="lmdb", help="of the data base (%(default)s)"
    )


def _features(verb: Parser) -> None:
    verb.add_argument("trained", metavar="CAFFEMODEL")
    verb.add_argument("net", metavar="PROTOTXT")
    verb.add_argument("blobs", metavar="BLOB,...")
    verb.add_argument("targets", metavar="DB_NAME,...", help="a new data base for each")
    verb.add_argument("batches", metavar="BATCHES", type=at_least(1))
    verb.add_argument("backend", metavar="DB_TYPE", choices=("lmdb", "leveldb"))
    verb.add_argument("device", nargs="*", metavar="CPU", help="taken for Caffe's sake")


def convert_imageset(args: argparse.Namespace) -> int:
    if bool(args.resize_width) != bool(args.resize_height):
        raise WrongRequestError("give both --resize_height and --resize_width, or none")
    from soonest.caffe.io.log import to_stderr
    from soonest.caffe.tools.convert_imageset import Settings, convert

    settings = Settings(
        gray=args.gray,
        shuffle=args.shuffle,
        size=(args.resize_height, args.resize_width),
        check_size=args.check_size,
        encoded=args.encoded,
        encode_type=args.encode_type,
        backend=args.backend,
    )
    convert(args.root, args.list, args.target, settings, say=to_stderr)
    return 0


def compute_image_mean(args: argparse.Namespace) -> int:
    from soonest.caffe.io.log import to_stderr
    from soonest.caffe.tools.compute_image_mean import compute

    compute(args.source, args.target, args.backend, say=to_stderr)
    return 0


def extract_features(args: argparse.Namespace) -> int:
    from soonest.caffe.io.log import to_stderr
    from soonest.caffe.tools.extract_features import extract

    if args.device and args.device[0] == "GPU":
        to_stderr("Use CPU. GPUs are not supported: GPU is not used.")
    blobs, targets = args.blobs.split(","), args.targets.split(",")
    extract(args.trained, args.net, blobs, targets, args.batches, args.backend, say=to_stderr)
    return 0


def upgrade(args: argparse.Namespace) -> int:
    from soonest.caffe.io.log import to_stderr
    from soonest.caffe.tools import upgrade_protos

    run = {
        "upgrade_net_proto_text": upgrade_protos.net_text,
        "upgrade_net_proto_binary": upgrade_protos.net_binary,
        "upgrade_solver_proto_text": upgrade_protos.solver_text,
    }[args.verb]
    return 0 if run(args.source, args.target, say=to_stderr) else 1


def draw_net(args: argparse.Namespace) -> int:
    from soonest.caffe.tools.draw_net import draw

    draw(args.source, args.target, rankdir=args.rankdir, phase=args.phase)
    return 0


def parse_log(args: argparse.Namespace) -> int:
    from soonest.caffe.tools import parse_log as tool

    found = tool.parse(args.log)
    for path in tool.write_tables(found, args.log, args.folder, args.delimiter):
        print(path)
    picture = Path(args.folder) / f"{Path(args.log).name}.png"
    tool.draw(found, picture)
    print(picture)
    return 0


def convert(args: argparse.Namespace) -> int:
    from soonest.caffe.io.log import to_stderr
    from soonest.caffe.tools import to_torch

    to_torch.convert(args.net, args.trained, args.target, say=to_stderr)
    return 0

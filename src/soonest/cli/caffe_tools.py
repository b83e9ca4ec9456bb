"""``soonest caffe``'s companions: the programs that come with Caffe, under their names there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from soonest.cli.request import WrongRequestError, at_least

_YES, _NO = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")


def add_to(verbs: Any) -> None:
    _add_convert_imageset(verbs)
    _add_compute_image_mean(verbs)
    _add_extract_features(verbs)
    _add_upgrades(verbs)
    _add_draw_net(verbs)
    _add_parse_log(verbs)
    _add_device_query(verbs)
    _add_convert(verbs)


def add_switch(verb: Any, name: str, help_: str) -> None:
    """A flag in every form that Caffe's programs take: ``--x``, ``--nox``, ``-x=false``."""
    verb.add_argument(f"--{name}", f"-{name}", action="store_true", help=help_)
    for words, value in ((_YES, True), (_NO, False)):
        forms = [f"{dashes}{name}={word}" for dashes in ("--", "-") for word in words]
        forms += [] if value else [f"--no{name}", f"-no{name}"]
        verb.add_argument(
            *forms, dest=name, action="store_const", const=value, help=argparse.SUPPRESS
        )


def add_backend(verb: Any) -> None:
    verb.add_argument(
        "--backend",
        "-backend",
        choices=("lmdb", "leveldb"),
        default="lmdb",
        help="of the data base (%(default)s)",
    )


def _add_convert_imageset(verbs: Any) -> None:
    verb = verbs.add_parser(
        "convert_imageset",
        help="make a data base of images",
        description="Makes a data base of the images that a list names, each with its label.",
    )
    verb.add_argument("root", metavar="ROOTFOLDER/", help="what stands before each name")
    verb.add_argument("list", metavar="LISTFILE", help="a name, a space and a label in each line")
    verb.add_argument("target", metavar="DB_NAME", help="the new data base")
    add_switch(verb, "gray", "one channel, not three")
    add_switch(verb, "shuffle", "leave the order to chance")
    add_switch(verb, "check_size", "make sure that all have one size")
    add_switch(verb, "encoded", "store the files as they are")
    verb.add_argument(
        "--encode_type", "-encode_type", default="", metavar="TYPE", help="store as png, jpg, …"
    )
    for name in ("width", "height"):
        verb.add_argument(
            f"--resize_{name}", f"-resize_{name}", type=at_least(0), default=0, metavar="PIXELS",
            help=f"bring to this {name} (both, or none)",
        )  # fmt: skip
    add_backend(verb)
    verb.set_defaults(run=convert_imageset)


def _add_compute_image_mean(verbs: Any) -> None:
    verb = verbs.add_parser(
        "compute_image_mean",
        help="the mean image of a data base",
        description="Writes the mean of all images of a data base, and says that of each channel.",
    )
    verb.add_argument("source", metavar="INPUT_DB")
    verb.add_argument("target", metavar="OUTPUT_FILE", nargs="?", default="", help="binaryproto")
    add_backend(verb)
    verb.set_defaults(run=compute_image_mean)


def _add_extract_features(verbs: Any) -> None:
    verb = verbs.add_parser(
        "extract_features",
        help="write blobs of a net to data bases",
        description="Runs a net in the phase TEST and writes some of its blobs to data bases.",
    )
    verb.add_argument("weights", metavar="CAFFEMODEL")
    verb.add_argument("model", metavar="PROTOTXT")
    verb.add_argument("blobs", metavar="BLOB,...")
    verb.add_argument("targets", metavar="DB_NAME,...", help="a new data base for each")
    verb.add_argument("batches", metavar="BATCHES", type=at_least(1))
    verb.add_argument("backend", metavar="DB_TYPE", choices=("lmdb", "leveldb"))
    verb.add_argument("device", nargs="*", metavar="CPU", help="taken for Caffe's sake")
    verb.set_defaults(run=extract_features)


def _add_upgrades(verbs: Any) -> None:
    for name, what in (
        ("upgrade_net_proto_text", "the definition of a net"),
        ("upgrade_net_proto_binary", "a caffemodel"),
        ("upgrade_solver_proto_text", "a solver"),
    ):
        verb = verbs.add_parser(
            name,
            help=f"bring {what} to today's form",
            description=f"Brings {what} of any age to today's form.",
        )
        verb.add_argument("source", metavar="OLD")
        verb.add_argument("target", metavar="NEW")
        verb.set_defaults(run=upgrade, verb=name)


def _add_draw_net(verbs: Any) -> None:
    verb = verbs.add_parser(
        "draw_net",
        help="draw a net",
        description="Draws a net as .svg; as .png, .pdf and others if graphviz is installed.",
    )
    verb.add_argument("source", metavar="PROTOTXT")
    verb.add_argument("target", metavar="PICTURE")
    verb.add_argument(
        "--rankdir", choices=("LR", "TB", "RL", "BT"), default="LR", help="(%(default)s)"
    )
    verb.add_argument(
        "--phase", choices=("TRAIN", "TEST", "ALL"), default="ALL", help="(%(default)s)"
    )
    verb.set_defaults(run=draw_net)


def _add_parse_log(verbs: Any) -> None:
    verb = verbs.add_parser(
        "parse_log",
        help="make tables and a picture of a training's log",
        description="Writes LOG.train and LOG.test, tables of what a log says, and LOG.png, a "
        "picture of losses and accuracies.",
    )
    verb.add_argument("log", metavar="LOG")
    verb.add_argument("folder", metavar="FOLDER", help="to write to")
    verb.add_argument("--delimiter", default=",", help="between numbers (%(default)s)")
    verb.add_argument("--verbose", action="store_true", help="taken for Caffe's sake")
    verb.set_defaults(run=parse_log)


def _add_device_query(verbs: Any) -> None:
    verb = verbs.add_parser(
        "device_query", help="say which GPUs there are", description="Says which GPUs there are."
    )
    verb.add_argument("--gpu", "-gpu", default="", metavar="ID,...", help="or all")
    verb.set_defaults(run=device_query)


def _add_convert(verbs: Any) -> None:
    verb = verbs.add_parser(
        "convert",
        help="turn a net into a module of plain torch",
        description="Writes TARGET.py, a module that needs torch and nothing else, and TARGET.pt, "
        "its weights; then runs both beside the net.",
    )
    verb.add_argument("--to", choices=("torch",), default="torch", help="(%(default)s)")
    verb.add_argument("model", metavar="PROTOTXT")
    verb.add_argument("weights", metavar="CAFFEMODEL")
    verb.add_argument("target", metavar="TARGET", help="without an ending")
    verb.set_defaults(run=convert)


def convert_imageset(args: argparse.Namespace) -> int:
    if bool(args.resize_width) != bool(args.resize_height):
        raise WrongRequestError("give both --resize_height and --resize_width, or none")
    try:
        from soonest.caffe.log import to_stderr
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
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def compute_image_mean(args: argparse.Namespace) -> int:
    try:
        from soonest.caffe.log import to_stderr
        from soonest.caffe.tools.compute_image_mean import compute

        compute(args.source, args.target, args.backend, say=to_stderr)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def extract_features(args: argparse.Namespace) -> int:
    try:
        from soonest.caffe.log import to_stderr
        from soonest.caffe.tools.extract_features import extract

        if args.device and args.device[0] == "GPU":
            to_stderr("Use CPU. GPUs are not supported: GPU is not used.")
        blobs, targets = args.blobs.split(","), args.targets.split(",")
        extract(args.weights, args.model, blobs, targets, args.batches, args.backend, say=to_stderr)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def upgrade(args: argparse.Namespace) -> int:
    try:
        from soonest.caffe.log import to_stderr
        from soonest.caffe.tools import upgrade_protos

        run = {
            "upgrade_net_proto_text": upgrade_protos.net_text,
            "upgrade_net_proto_binary": upgrade_protos.net_binary,
            "upgrade_solver_proto_text": upgrade_protos.solver_text,
        }[args.verb]
        return 0 if run(args.source, args.target, say=to_stderr) else 1
    except ValueError as error:
        raise WrongRequestError(str(error)) from None


def draw_net(args: argparse.Namespace) -> int:
    try:
        from soonest.caffe.tools.draw_net import draw

        draw(args.source, args.target, rankdir=args.rankdir, phase=args.phase)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def parse_log(args: argparse.Namespace) -> int:
    try:
        from soonest.caffe.tools import parse_log as tool

        found = tool.parse(args.log)
        for path in tool.write_tables(found, args.log, args.folder, args.delimiter):
            print(path)
        picture = Path(args.folder) / f"{Path(args.log).name}.png"
        tool.draw(found, picture)
        print(picture)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def device_query(args: argparse.Namespace) -> int:
    try:
        from soonest.caffe.log import to_stderr
        from soonest.caffe.tools.device_query import query

        query(args.gpu, say=to_stderr)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0


def convert(args: argparse.Namespace) -> int:
    try:
        from soonest.caffe.log import to_stderr
        from soonest.caffe.tools import to_torch

        to_torch.convert(args.model, args.weights, args.target, say=to_stderr)
    except ValueError as error:
        raise WrongRequestError(str(error)) from None
    return 0

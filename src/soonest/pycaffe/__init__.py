"""What Python scripts for Caffe import: ``from soonest import pycaffe as caffe``.

It has pycaffe's names and ways over soonest's nets and solvers. ``python -m soonest.pycaffe
script.py`` runs a script that says ``import caffe``.
"""

from soonest.caffe.layers.python import PythonLayer as Layer
from soonest.pycaffe import classifier, detector, draw, io, net_spec, proto
from soonest.pycaffe.classifier import Classifier
from soonest.pycaffe.detector import Detector
from soonest.pycaffe.device import (
    has_nccl,
    init_log,
    layer_type_list,
    log,
    set_device,
    set_mode_cpu,
    set_mode_gpu,
    set_multiprocess,
    set_random_seed,
    set_solver_count,
    set_solver_rank,
    solver_count,
    solver_rank,
)
from soonest.pycaffe.net import TEST, TRAIN, Net
from soonest.pycaffe.net_spec import NetSpec, layers, params, to_proto
from soonest.pycaffe.solver import (
    AdaDeltaSolver,
    AdaGradSolver,
    AdamSolver,
    NesterovSolver,
    RMSPropSolver,
    SGDSolver,
    Solver,
    get_solver,
)

__version__ = "1.0.0"
"""Of the Caffe whose pycaffe this is like."""

__all__ = [
    "AdaDeltaSolver", "AdaGradSolver", "AdamSolver", "Classifier", "Detector", "Layer", "Net",
    "NetSpec", "NesterovSolver", "RMSPropSolver", "SGDSolver", "Solver", "TEST", "TRAIN",
    "classifier", "detector", "draw", "get_solver", "has_nccl", "init_log", "io",
    "layer_type_list", "layers", "log", "net_spec", "params", "proto", "set_device",
    "set_mode_cpu", "set_mode_gpu", "set_multiprocess", "set_random_seed", "set_solver_count",
    "set_solver_rank", "solver_count", "solver_rank", "to_proto",
]  # fmt: skip

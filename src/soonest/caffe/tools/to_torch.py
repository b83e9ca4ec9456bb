"""``convert --to torch``: a net of Caffe as a module of plain torch, and its weights."""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soonest.caffe.data.records import RecordLayer
from soonest.caffe.files import replaced
from soonest.caffe.io import prototxt, weights
from soonest.caffe.io.log import Say
from soonest.caffe.layers.base import Shape
from soonest.caffe.net.net import Net
from soonest.caffe.net.step import Step, listed
from soonest.caffe.net.trained import copy_weights
from soonest.caffe.tools.torch_layers import written
from soonest.caffe.tools.torch_part import Part

_LEFT_OUT = ("Accuracy", "Silence")
_SOURCES = ("Input", "DummyData", "MemoryData")


@dataclass
class Module:
    """The parts of a module's source, and its state.

    Attributes:
        inputs: its arguments, by blob, with their shapes.
        made: lines that make its parts.
        shared: lines that make two names one parameter.
        run: lines of its forward pass.
        outputs: variables that it returns, by blob.
        state: what its state has.
    """

    inputs: dict[str, tuple[str, Shape]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)
    run: list[str] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def convert(net_file: str, model: str, target: str, *, say: Say) -> float:
    """Writes ``TARGET.py``, a module that needs torch alone, and ``TARGET.pt``, its state.

    Both are read again and run beside the net that they were made of.

    Args:
        net_file: the definition, best the one that is deployed.
        model: the weights.
        target: without an ending.
        say: what log lines go to.

    Returns:
        How far the outputs of both are apart at most, over the peak of each or 1.

    Raises:
        ValueError: a file cannot be read or written, or a layer has no like in torch.
    """
    net = Net(prototxt.read_net(net_file), "TEST", file=net_file)
    copy_weights(net, weights.read(model), file=model)
    target = re.sub(r"\.(py|pt)$", "", target)
    if not Path(target).name.isidentifier():
        raise ValueError(f"{Path(target).name!r} is no name of a module: take letters, digits, _")
    try:
        module = _module(net, say)
    finally:
        net.close()
    source = _source(module, net_file, Path(target).name)
    with replaced(f"{target}.py") as new:
        new.write_text(source, encoding="utf-8")
    with replaced(f"{target}.pt") as new:
        torch.save(module.state, new)
    say(f"Wrote {target}.py and {target}.pt")
    apart = _apart(net, module, load(target))
    say(f"Outputs are within {apart:.2g} of the net's")
    return apart


def load(target: str) -> nn.Module:
    """The module in ``TARGET.py`` with the state in ``TARGET.pt``, ready to run."""
    spec = importlib.util.spec_from_file_location(Path(target).name, f"{target}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    sys.modules.pop(spec.name, None)
    return found.load(f"{target}.pt")


def _module(net: Net, say: Say) -> Module:
    module = Module()
    names = _Names(dir(nn.Module()))
    variables: dict[str, str] = {}
    shapes: dict[str, Shape] = {}
    unread: dict[str, str] = {}
    taken = _Names(["self", "torch", "nn", "F"])
    owned: dict[int, str] = {}
    for step in net.steps:
        kind = step.layer.spec.type
        known = [name for name in step.bottoms if name in variables]
        if kind in _SOURCES or isinstance(step.layer, RecordLayer):
            for name, top in zip(step.tops, _tops(step, []), strict=True):
                variables[name] = taken.new(name)
                shapes[name] = tuple(top.shape)
                module.inputs[name] = variables[name], shapes[name]
            continue
        if kind in _LEFT_OUT or step.layer.is_loss or len(known) < len(step.bottoms):
            say(f"Leaving out {kind} {step.layer.spec.name}")
            continue
        attribute = names.new(step.layer.spec.name)
        try:
            expression, part = written(
                step.layer,
                attribute,
                [variables[name] for name in step.bottoms],
                [shapes[name] for name in step.bottoms],
            )
        except ValueError as error:
            raise ValueError(f"{step.place}: {error}") from None
        _add(module, part, owned)
        found = _tops(step, [torch.zeros(shapes[name]) for name in step.bottoms])
        for name in step.bottoms:
            unread.pop(name, None)
        for name, top in zip(step.tops, found, strict=True):
            if name not in step.bottoms:
                variables[name] = taken.new(name)
            shapes[name] = tuple(top.shape)
            unread[name] = variables[name]
        module.run.append(f"{', '.join(variables[name] for name in step.tops)} = {expression}")
    module.outputs = dict(sorted(unread.items()))
    used = set(re.findall(r"\w+", " ".join(module.run)))
    module.inputs = {blob: one for blob, one in module.inputs.items() if one[0] in used}
    return module


def _tops(step: Step, bottoms: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return listed(step.layer(*bottoms))


def _add(module: Module, part: Part, owned: dict[int, str]) -> None:
    """Adds the parts of a layer; a weight that another has already is that one's."""
    module.made += [f"self.{name} = {what}" for name, what in part.modules.items()]
    module.state.update(part.state)
    for name, tensor in part.owners.items():
        owner = owned.setdefault(tensor, name)
        if owner != name:
            module.shared.append(f"self.{name} = self.{owner}")


def _source(module: Module, net_file: str, name: str) -> str:
    variables = [one for one, _ in module.inputs.values()]
    arguments = ", ".join(f"{one}: Tensor" for one in variables)
    outputs = list(module.outputs.values())
    returned = "Tensor" if len(outputs) == 1 else "tuple[Tensor, ...]"
    shapes = "\n".join(f"        {one}: {list(shape)}" for one, shape in module.inputs.values())
    lines = [
        f'"""Made from {Path(net_file).name} by soonest. It needs torch and nothing else.',
        "",
        f"    net = {name}.load()",
        f"    {', '.join(outputs)} = net({', '.join(variables)})",
        '"""',
        "",
        "from pathlib import Path",
        "",
        "import torch",
        "from torch import Tensor, nn",
        "from torch.nn import functional as F",
        "",
        "",
        "class Net(nn.Module):",
        '    """What Caffe\'s net computes.',
        "",
        "    Inputs had these shapes in Caffe:",
        shapes,
        '    """',
        "",
        "    def __init__(self) -> None:",
        "        super().__init__()",
        *(f"        {line}" for line in [*module.made, *module.shared]),
        "",
        f"    def forward(self, {arguments}) -> {returned}:",
        *(f"        {line}" for line in module.run),
        f"        return {', '.join(outputs)}",
        "",
        "",
        f'def load(path: str | Path = Path(__file__).with_name("{name}.pt")) -> Net:',
        '    """The net with its weights, set to test."""',
        "    net = Net()",
        "    net.load_state_dict(torch.load(path, weights_only=True))",
        "    return net.eval()",
        "",
    ]
    return "\n".join(lines)


@torch.no_grad()
def _apart(net: Net, module: Module, made: nn.Module) -> float:
    """Runs both on the same values, and compares."""
    torch.manual_seed(0)
    fed = {blob: torch.rand(shape) for blob, (_, shape) in module.inputs.items()}
    blobs: dict[str, Tensor] = {}
    for step in net.steps:
        tops = _tops(step, [blobs[name] for name in step.bottoms])
        for name, top in zip(step.tops, tops, strict=True):
            blobs[name] = fed.get(name, top) if not step.bottoms else top
    found: Any = made(*fed.values())
    found = [found] if isinstance(found, Tensor) else list(found)
    return max(
        float((one - blobs[name]).abs().max() / max(1.0, float(blobs[name].abs().max())))
        for one, name in zip(found, module.outputs, strict=True)
    )


class _Names:
    """Names that Python allows, each once.

    Args:
        taken: those that are in use.
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = set(taken)

    def new(self, wanted: str) -> str:
        """The nearest free one."""
        name = re.sub(r"\W", "_", wanted, flags=re.ASCII) or "unnamed"
        name = f"_{name}" if name[0].isdigit() else name
        while name in self._taken or keyword.iskeyword(name):
            name += "_"
        self._taken.add(name)
        return name

"""pycaffe's ``NetSpec``, ``layers`` and ``params``: definitions of nets written in Python."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

from soonest.caffe.proto.schema import MESSAGES
from soonest.pycaffe.proto import caffe_pb2

_NAMES = {
    field.type_name.removesuffix("Parameter"): field.name
    for field in MESSAGES["LayerParameter"].fields.values()
    if field.name.endswith("_param")
}
"""Per type of layer that has settings of its own, the field with them."""


class Top:
    """What a layer gives.

    Attributes:
        fn: the layer.
        n: which of its tops this is.
    """

    def __init__(self, fn: Function, n: int) -> None:
        self.fn = fn
        self.n = n

    def to_proto(self) -> Any:
        """The net that gives this."""
        return to_proto(self)


class Function:
    """A layer of a net that is being written.

    Args:
        type_name: of the layer.
        inputs: what it reads.
        params: its fields; ``ntop``, ``name`` and ``in_place`` besides.
    """

    def __init__(self, type_name: str, inputs: Iterable[Top], params: dict[str, Any]) -> None:
        self.type_name = type_name
        self.inputs = list(inputs)
        for number, one in enumerate(self.inputs):
            if not isinstance(one, Top):
                raise TypeError(
                    f"{type_name} reads {one!r} as number {number}: give what a layer has given"
                )
        self.params = dict(params)
        self.ntop = self.params.pop("ntop", 1)
        self.name: str | None = self.params.pop("name", None)
        self.in_place = self.params.pop("in_place", False)
        self.tops = tuple(Top(self, n) for n in range(self.ntop))

    def to_message(self, names: dict[Function, str], tops: dict[Top, str], counts: Counter[str]
                   ) -> Any:  # fmt: skip
        """The layer, with the names that others have."""
        layer = caffe_pb2.LayerParameter()
        layer.type = self.type_name
        layer.bottom.extend(tops[one] for one in self.inputs)
        if self.in_place:
            layer.top.extend(layer.bottom)
        else:
            layer.top.extend(_named(top, names, tops, counts) for top in self.tops)
        layer.name = _layer_name(self, names, counts)
        for key, value in self.params.items():
            if key in layer.DESCRIPTOR.fields_by_name:
                _assign(layer, key, value)
            elif self.type_name in _NAMES:
                _assign(getattr(layer, _NAMES[self.type_name]), key, value)
            else:
                raise ValueError(
                    f"{self.type_name} has no field {key!r}: name the message that it is in, as in "
                    "convolution_param=dict(...)"
                )
        return layer


def _assign(message: Any, key: str, value: Any) -> None:
    """Sets a field from dictionaries and lists."""
    field = message.DESCRIPTOR.fields_by_name.get(key)
    if field is None:
        raise ValueError(f"{message.DESCRIPTOR.name} has no field {key!r}")
    place = getattr(message, key)
    repeated = hasattr(place, "extend")
    if field.message_type is None:
        if repeated:
            place.extend(value if isinstance(value, list | tuple) else [value])
        else:
            setattr(message, key, _number(field, value))
        return
    for one in value if isinstance(value, list | tuple) else [value]:
        inner = place.add() if repeated else place
        inner.SetInParent()
        for name, what in one.items():
            _assign(inner, name, what)


def _number(field: Any, value: Any) -> Any:
    """The number of an enum that is given by its name."""
    if field.enum_type is not None and isinstance(value, str):
        if value not in field.enum_type.values_by_name:
            known = ", ".join(field.enum_type.values_by_name)
            raise ValueError(f"{field.name!r} has no value {value!r}: it has {known}")
        return field.enum_type.values_by_name[value].number
    return value


def _layer_name(one: Function, names: dict[Function, str], counts: Counter[str]) -> str:
    if one not in names:
        if one.name is None:
            counts[one.type_name] += 1
            one_name = f"{one.type_name}{counts[one.type_name]}"
        else:
            one_name = one.name
        names[one] = one_name
    return names[one]


def _named(top: Top, names: dict[Function, str], tops: dict[Top, str], counts: Counter[str]) -> str:
    if top not in tops:
        if top.fn.in_place:
            tops[top] = _named(top.fn.inputs[top.n], names, tops, counts)
        else:
            own = _layer_name(top.fn, names, counts)
            tops[top] = own if top.fn.ntop == 1 else f"{own}{top.n + 1}"
    return tops[top]


def _net(functions: Iterable[Function], names: dict[Function, str], tops: dict[Top, str]) -> Any:
    """The net of these layers, and of those that they read from, each once."""
    net = caffe_pb2.NetParameter()
    counts: Counter[str] = Counter()
    done: set[Function] = set()

    def add(one: Function) -> None:
        if one in done:
            return
        done.add(one)
        for read in one.inputs:
            add(read.fn)
        for read in one.inputs:
            _named(read, names, tops, counts)
        net.layer.add().CopyFrom(one.to_message(names, tops, counts))

    for one in functions:
        add(one)
    return net


def to_proto(*tops: Top) -> Any:
    """The net that gives all of these, as a ``NetParameter``; names are made up."""
    return _net([top.fn for top in tops], {}, {})


class NetSpec:
    """A net that is being written: its attributes are blobs, which get their names."""

    def __init__(self) -> None:
        super().__setattr__("tops", OrderedDict())

    def __setattr__(self, name: str, value: Any) -> None:
        self.tops[name] = value

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["tops"][name]
        except KeyError:
            raise AttributeError(f"the net has no blob {name!r} so far") from None

    def __setitem__(self, name: str, value: Any) -> None:
        self.tops[name] = value

    def __getitem__(self, name: str) -> Any:
        return self.tops[name]

    def __delitem__(self, name: str) -> None:
        del self.tops[name]

    def __delattr__(self, name: str) -> None:
        del self.tops[name]

    def keys(self) -> list[str]:
        """Names of blobs."""
        return list(self.tops)

    def vals(self) -> list[Any]:
        """What has been assigned."""
        return list(self.tops.values())

    def update(self, other: dict[str, Any]) -> None:
        """Takes over names and blobs."""
        self.tops.update(other)

    def to_proto(self) -> Any:
        """The net as a ``NetParameter``, whose text is a prototxt."""
        names: dict[Function, str] = {}
        tops: dict[Top, str] = {}
        for name, top in self.tops.items():
            own = top if isinstance(top, Function) else top.fn
            if own.name is not None:
                names.setdefault(own, own.name)
            names.setdefault(own, name)
            if isinstance(top, Top) and not own.in_place:
                tops[top] = name
        return _net(
            [top if isinstance(top, Function) else top.fn for top in self.tops.values()],
            names, tops,
        )  # fmt: skip


class _Layers:
    """``layers.Convolution(bottom, num_output=8)`` and others, by their types."""

    def __getattr__(self, name: str) -> Any:
        def layer(*inputs: Top, **params: Any) -> Any:
            one = Function(name, inputs, params)
            if one.ntop == 0:
                return one
            return one.tops[0] if one.ntop == 1 else one.tops

        return layer


class _Values:
    """Values of the enums of a layer, as ``params.Pooling.MAX``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> int:
        message = getattr(caffe_pb2, f"{self._name}Parameter")
        for enum in message.DESCRIPTOR.enum_types:
            if name in enum.values_by_name:
                return enum.values_by_name[name].number
        raise AttributeError(f"{self._name}Parameter has no value {name!r}")


class _Params:
    def __getattr__(self, name: str) -> _Values:
        return _Values(name)


layers = _Layers()
params = _Params()

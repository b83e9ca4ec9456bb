"""Brings old definitions of nets and solvers to today's form, as Caffe's upgrade tools do.

Two older forms of a layer exist. V0 has ``layers { layer { type: "conv" num_output: 8 } }`` with
all numbers in one place; V1 has ``layers { type: CONVOLUTION convolution_param { num_output: 8 }
}``.
"""

from __future__ import annotations

from collections.abc import Callable

from soonest.caffe.io import log
from soonest.caffe.proto.message import Message

_SHARED_NAMES = {
    "ABSVAL": "AbsVal", "ARGMAX": "ArgMax", "BNLL": "BNLL", "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output", "LRN": "LRN", "MVN": "MVN", "RELU": "ReLU", "TANH": "TanH",
    "SOFTMAX_LOSS": "SoftmaxWithLoss", "NONE": "",
}  # fmt: skip
"""Types whose new names do not follow from the old ones."""

_V0_TYPES = {
    "pool": "POOLING", "conv": "CONVOLUTION", "innerproduct": "INNER_PRODUCT",
    "images": "IMAGE_DATA",
    **{name: name.upper() for name in (
        "accuracy", "bnll", "concat", "data", "dropout", "euclidean_loss", "flatten", "hdf5_data",
        "hdf5_output", "im2col", "infogain_loss", "lrn", "multinomial_logistic_loss", "relu",
        "sigmoid", "softmax", "softmax_loss", "split", "tanh", "window_data",
    )},
}  # fmt: skip

_DATA = ("data", "hdf5_data", "images", "window_data")
_WEIGHTED = {"conv": "convolution_param", "innerproduct": "inner_product_param"}
_WINDOWED = {"conv": "convolution_param", "pool": "pooling_param"}
_SOURCES = {
    "data": "data_param", "hdf5_data": "hdf5_data_param", "images": "image_data_param",
    "window_data": "window_data_param", "infogain_loss": "infogain_loss_param",
}  # fmt: skip
_TRANSFORMED: dict[str, str] = dict.fromkeys(_DATA, "transform_param")
_LRN = {"lrn": "lrn_param"}
_IMAGES = {"images": "image_data_param"}
_WINDOWS = {"window_data": "window_data_param"}

_V0_FIELDS: dict[str, tuple[dict[str, str], str]] = {
    "num_output": (_WEIGHTED, "num_output"),
    "biasterm": (_WEIGHTED, "bias_term"),
    "weight_filler": (_WEIGHTED, "weight_filler"),
    "bias_filler": (_WEIGHTED, "bias_filler"),
    "pad": (_WINDOWED, "pad"),
    "kernelsize": (_WINDOWED, "kernel_size"),
    "stride": (_WINDOWED, "stride"),
    "group": ({"conv": "convolution_param"}, "group"),
    "pool": ({"pool": "pooling_param"}, "pool"),
    "dropout_ratio": ({"dropout": "dropout_param"}, "dropout_ratio"),
    "local_size": (_LRN, "local_size"),
    "alpha": (_LRN, "alpha"),
    "beta": (_LRN, "beta"),
    "k": (_LRN, "k"),
    "source": (_SOURCES, "source"),
    "batchsize": (_SOURCES, "batch_size"),
    "scale": (_TRANSFORMED, "scale"),
    "meanfile": (_TRANSFORMED, "mean_file"),
    "cropsize": (_TRANSFORMED, "crop_size"),
    "mirror": (_TRANSFORMED, "mirror"),
    "rand_skip": ({"data": "data_param", **_IMAGES}, "rand_skip"),
    "shuffle_images": (_IMAGES, "shuffle"),
    "new_height": (_IMAGES, "new_height"),
    "new_width": (_IMAGES, "new_width"),
    "concat_dim": ({"concat": "concat_param"}, "concat_dim"),
    "det_fg_threshold": (_WINDOWS, "fg_threshold"),
    "det_bg_threshold": (_WINDOWS, "bg_threshold"),
    "det_fg_fraction": (_WINDOWS, "fg_fraction"),
    "det_context_pad": (_WINDOWS, "context_pad"),
    "det_crop_mode": (_WINDOWS, "crop_mode"),
}
"""Per field of V0, in which message it belongs by type of layer, and its name there."""


def net(old: Message, *, warn: Callable[[str], None] = log.warning) -> Message:
    """A ``NetParameter`` in today's form.

    Args:
        old: of any age; it is not changed.
        warn: what is told of fields that a layer of the oldest form cannot have, and has not.

    Raises:
        ValueError: it mixes forms.
    """
    if old.has("layer") and old.has("layers"):
        raise ValueError(
            "the net has both 'layer' and 'layers', which are its new and its old form: use one"
        )
    new = Message("NetParameter")
    new.line = old.line
    for name in ("name", "force_backward", "state", "debug_info"):
        if old.has(name):
            setattr(new, name, getattr(old, name))
    new.layer = list(old.layer) if old.has("layer") else _layers(old.layers, warn)
    _inputs(old, new)
    for layer in new.layer:
        if layer.type == "BatchNorm" and layer.has("param"):
            _still(layer)
    return new


def solver(old: Message) -> Message:
    """A ``SolverParameter`` in today's form: its type by name, which once was a number.

    Raises:
        ValueError: it has both.
    """
    if not old.has("solver_type"):
        return old
    if old.has("type"):
        raise ValueError("the solver has both 'type' and 'solver_type', its old form: use 'type'")
    names = ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam")
    new = _copy(old, leave="solver_type")
    new.type = next(name for name in names if name.upper() == old.solver_type)
    return new


def _copy(old: Message, *, leave: str) -> Message:
    new = Message(old.schema)
    new.line = old.line
    new.values.update({name: value for name, value in old.values.items() if name != leave})
    return new


def _layers(old: list[Message], warn: Callable[[str], None]) -> list[Message]:
    if any(layer.has("layer") for layer in old):
        old = _without_padding([_from_v0(layer, warn) for layer in old])
    return [_from_v1(layer) for layer in old]


def _from_v0(outer: Message, warn: Callable[[str], None]) -> Message:
    inner = outer.layer
    new = Message("V1LayerParameter", bottom=outer.bottom, top=outer.top)
    new.line = outer.line
    what = f"layer {inner.name!r}{_in_line(outer)}"
    if not outer.has("layer"):
        raise ValueError(f"{what}: all layers must have the same form, and others are nested")
    if inner.has("name"):
        new.name = inner.name
    if inner.type == "padding":
        new.put("convolution_param").pad = [inner.pad]  # Until it is folded into the next layer.
    elif inner.type not in _V0_TYPES:
        raise ValueError(f"{what} has the type {inner.type!r}, which the oldest form does not know")
    else:
        new.type = _V0_TYPES[inner.type]
    for name in ("blobs", "blobs_lr", "weight_decay", "hdf5_output_param"):
        if inner.has(name):
            setattr(new, name, getattr(inner, name))
    for name, (places, new_name) in _V0_FIELDS.items():
        if not inner.has(name) or inner.type == "padding":
            continue
        if inner.type not in places:
            warn(f"{what}: Unknown parameter {name} for layer type {inner.type}; it is left out")
            continue
        into = new.put(places[inner.type])
        value = getattr(inner, name)
        setattr(into, new_name, [value] if into.schema.fields[new_name].repeated else value)
    return new


def _without_padding(layers: list[Message]) -> list[Message]:
    """Folds layers that only pad into those that read them."""
    kept: list[Message] = []
    padding: dict[str, Message] = {}
    for layer in layers:
        if not layer.has("type"):
            if len(layer.bottom) != 1 or len(layer.top) != 1:
                raise ValueError(f"padding{_in_line(layer)} needs one bottom and one top")
            padding[layer.top[0]] = layer
            continue
        for index, name in enumerate(layer.bottom):
            if name not in padding:
                continue
            if layer.type not in ("CONVOLUTION", "POOLING"):
                raise ValueError(
                    f"layer {layer.name!r}{_in_line(layer)} reads padding {name!r}, which only "
                    "convolution and pooling can"
                )
            pad = padding[name].convolution_param.pad[0]
            if layer.type == "CONVOLUTION":
                layer.put("convolution_param").pad = [pad]
            else:
                layer.put("pooling_param").pad = pad
            layer.bottom[index] = padding[name].bottom[0]
        kept.append(layer)
    return kept


def _from_v1(old: Message) -> Message:
    type_ = old.type
    what = f"layer {old.name!r}{_in_line(old)}"
    name = _SHARED_NAMES.get(type_)
    new = Message("LayerParameter", type=type_.title().replace("_", "") if name is None else name)
    new.line = old.line
    for field in old.schema.fields.values():
        if not old.has(field.name) or field.name in (
            "type", "param", "blob_share_mode", "blobs_lr", "weight_decay",
        ):  # fmt: skip
            continue
        if field.name == "layer":
            raise ValueError(
                f"{what}: all layers must have the same form, and others are not nested"
            )
        setattr(new, field.name, getattr(old, field.name))
    sources = ("param", "blob_share_mode", "blobs_lr", "weight_decay")
    targets = ("name", "share_mode", "lr_mult", "decay_mult")
    for source, target in zip(sources, targets, strict=True):
        for index, value in enumerate(getattr(old, source)):
            while len(new.param) <= index:
                new.add("param")
            setattr(new.param[index], target, value)
    _move_transform(new)
    return new


def _move_transform(layer: Message) -> None:
    """Old data layers scaled and cropped by fields of their own."""
    kept = {
        "Data": "data_param",
        "ImageData": "image_data_param",
        "WindowData": "window_data_param",
    }
    place = kept.get(layer.type)
    if place is None or not layer.has(place):
        return
    for name in ("scale", "mean_file", "crop_size", "mirror"):
        source = getattr(layer, place)
        if source.has(name):
            if source is layer.values[place]:
                layer.values[place] = source = _copy(source, leave="")
            setattr(layer.put("transform_param"), name, getattr(source, name))
            delattr(source, name)


def _inputs(old: Message, new: Message) -> None:
    names = list(old.input)
    if not names or not (old.has("input_shape") or old.has("input_dim")):
        return  # Without sizes they only say what another layer makes.
    if old.has("input_shape"):
        if old.has("input_dim"):
            raise ValueError("the net has both 'input_shape' and 'input_dim': use 'input_shape'")
        shapes = [list(shape.dim) for shape in old.input_shape]
    else:
        dims = list(old.input_dim)
        if len(dims) != 4 * len(names):
            raise ValueError(
                f"the net has {len(names)} 'input' and {len(dims)} 'input_dim': give four for each"
            )
        shapes = [dims[start : start + 4] for start in range(0, len(dims), 4)]
    if len(shapes) not in (1, len(names)):
        raise ValueError(
            f"the net has {len(names)} 'input' and {len(shapes)} 'input_shape': give one for each"
        )
    layer = Message("LayerParameter", name="input", type="Input", top=names)
    for shape in shapes:
        layer.put("input_param").add("shape", dim=shape)
    new.layer.insert(0, layer)


def _still(layer: Message) -> None:
    """The three blobs of a BatchNorm are kept by itself: no solver may move them."""
    params = [_copy(param, leave="") for param in layer.param]
    for param in params:
        param.lr_mult = 0
        param.decay_mult = 0
    layer.param = params


def _in_line(message: Message) -> str:
    return f" (line {message.line})" if message.line else ""

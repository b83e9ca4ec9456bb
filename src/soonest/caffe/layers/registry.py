"""Which class makes which type of layer."""

from __future__ import annotations

from soonest.caffe.data.database import Data
from soonest.caffe.data.images import ImageData
from soonest.caffe.data.tables import HDF5Data
from soonest.caffe.layers import (
    affine,
    convolution,
    inner_product,
    inputs,
    loss,
    neuron,
    normalise,
    pooling,
    shaping,
)
from soonest.caffe.layers.base import Layer

_MADE_HERE: tuple[type[Layer], ...] = (
    convolution.Convolution, convolution.Deconvolution, pooling.Pooling,
    inner_product.InnerProduct, inner_product.Embed,
    neuron.ReLU, neuron.PReLU, neuron.ELU, neuron.Sigmoid, neuron.TanH, neuron.Swish, neuron.Clip,
    neuron.Threshold, neuron.AbsVal, neuron.BNLL, neuron.Power, neuron.Exp, neuron.Log,
    neuron.Dropout,
    normalise.BatchNorm, normalise.LRN, normalise.MVN, affine.Scale, affine.Bias,
    shaping.Concat, shaping.Slice, shaping.Split, shaping.Silence, shaping.Flatten,
    shaping.Reshape, shaping.Tile, shaping.Crop, shaping.Eltwise, shaping.Reduction, shaping.ArgMax,
    loss.Softmax, loss.SoftmaxWithLoss, loss.MultinomialLogisticLoss, loss.HingeLoss,
    loss.EuclideanLoss, loss.SigmoidCrossEntropyLoss, loss.ContrastiveLoss, loss.Accuracy,
    inputs.Input, inputs.DummyData, Data, ImageData, HDF5Data,
)  # fmt: skip

LAYERS: dict[str, type[Layer]] = {one.__name__: one for one in _MADE_HERE}
"""Per type as prototxt has it, its class."""

UNSUPPORTED = {
    "MemoryData": "its data would come from a C++ program: use Data, HDF5Data or ImageData",
    **dict.fromkeys(
        ("BatchReindex", "Filter", "HDF5Output", "Im2col", "InfogainLoss", "LSTM", "LSTMUnit",
         "Parameter", "Python", "RNN", "SPP", "WindowData"),
        "it is one of Caffe's, but not supported",
    ),
}  # fmt: skip
"""Types that Caffe has, and why they are refused."""

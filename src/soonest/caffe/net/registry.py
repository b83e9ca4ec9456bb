"""Which class makes which type of layer."""

from __future__ import annotations

from soonest.caffe.data.database import Data
from soonest.caffe.data.images import ImageData
from soonest.caffe.data.output import HDF5Output
from soonest.caffe.data.tables import HDF5Data
from soonest.caffe.data.windows import WindowData
from soonest.caffe.layers import (
    affine,
    convolution,
    inner_product,
    inputs,
    loss,
    neuron,
    normalise,
    pooling,
    python,
    recurrent,
    selecting,
    shaping,
)
from soonest.caffe.layers.base import Layer

_MADE_HERE: tuple[type[Layer], ...] = (
    convolution.Convolution, convolution.Deconvolution, convolution.Im2col,
    pooling.Pooling, pooling.SPP, inner_product.InnerProduct, inner_product.Embed,
    recurrent.RNN, recurrent.LSTM, recurrent.LSTMUnit,
    neuron.ReLU, neuron.PReLU, neuron.ELU, neuron.Sigmoid, neuron.TanH, neuron.Swish, neuron.Clip,
    neuron.Threshold, neuron.AbsVal, neuron.BNLL, neuron.Power, neuron.Exp, neuron.Log,
    neuron.Dropout,
    normalise.BatchNorm, normalise.LRN, normalise.MVN, affine.Scale, affine.Bias,
    shaping.Concat, shaping.Slice, shaping.Split, shaping.Silence, shaping.Flatten,
    shaping.Reshape, shaping.Tile, shaping.Crop, shaping.Eltwise, shaping.Reduction, shaping.ArgMax,
    selecting.Filter, selecting.BatchReindex,
    loss.Softmax, loss.SoftmaxWithLoss, loss.MultinomialLogisticLoss, loss.InfogainLoss,
    loss.HingeLoss, loss.EuclideanLoss, loss.SigmoidCrossEntropyLoss, loss.ContrastiveLoss,
    loss.Accuracy,
    inputs.Input, inputs.DummyData, inputs.MemoryData, inputs.Parameter,
    Data, ImageData, WindowData, HDF5Data, HDF5Output, python.Python,
)  # fmt: skip

LAYERS: dict[str, type[Layer]] = {one.__name__: one for one in _MADE_HERE}
"""Per type as prototxt has it, its class."""

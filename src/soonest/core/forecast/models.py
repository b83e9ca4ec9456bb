"""Well-known models of which nobody has a trace at hand: sizes and work of every layer.

Parameters are exact. Work is counted in multiply-adds of one sample, of matrix products and
convolutions alone; the rest takes little arithmetic, though on a real GPU some time. The backward
pass takes twice the work of the forward pass. How long that takes follows from a throughput that
the user states, so times are as good as that figure, and the same for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from soonest.core.trace import Layer, Trace

_BACKWARD = 2.0
"""A gradient of the input and one of the weight take a matrix product each."""


class Block(NamedTuple):
    """A layer in numbers.

    Args:
        name: of the layer.
        parameters: how many it has.
        macs: multiply-adds of a forward pass, for one sample.
    """

    name: str
    parameters: int
    macs: float = 0.0


def trace_of(name: str, *, tflops: float, batch: int = 32) -> Trace:
    """The trace of a model on a device of some throughput; updates take no time.

    Args:
        name: a key of ``MODELS``.
        tflops: what the device really sustains, 10^12 floating-point operations per second; a
            multiply-add is two.
        batch: samples per GPU.

    Raises:
        ValueError: there is no such model, or the figures make no sense.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}: there are {', '.join(MODELS)}")
    if not tflops > 0 or batch < 1:
        raise ValueError(f"{tflops} TFLOP/s and a batch of {batch}: both must be above zero")
    layers: list[Layer] = []
    for block in MODELS[name]():
        fwd_us = 2 * block.macs * batch / (tflops * 1e6)
        bwd_us = _BACKWARD * fwd_us
        layers.append(Layer(block.name, 4 * block.parameters, fwd_us, bwd_us))
    info = {
        "device": f"{tflops:g} TFLOP/s, assumed",
        "batch_size": batch,
        "dtype": "float32",
        "source": "counted, not measured",
    }
    return Trace(name, tuple(layers), 0.0, info)


def _conv(name: str, ins: int, outs: int, kernel: int, size: int, *, bias: bool = True) -> Block:
    weight = ins * outs * kernel * kernel
    return Block(name, weight + outs * bias, weight * size * size)


def _linear(name: str, ins: int, outs: int, *, times: int = 1) -> Block:
    return Block(name, ins * outs + outs, ins * outs * times)


def _norm(name: str, width: int) -> Block:
    return Block(name, 2 * width)


def alexnet() -> list[Block]:
    """A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014."""
    return [
        _conv("features.0", 3, 64, 11, 55),
        _conv("features.3", 64, 192, 5, 27),
        _conv("features.6", 192, 384, 3, 13),
        _conv("features.8", 384, 256, 3, 13),
        _conv("features.10", 256, 256, 3, 13),
        _linear("classifier.1", 256 * 6 * 6, 4096),
        _linear("classifier.4", 4096, 4096),
        _linear("classifier.6", 4096, 1000),
    ]


def vgg16() -> list[Block]:
    """K. Simonyan, A. Zisserman, ICLR 2015, configuration D."""
    widths = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
    blocks: list[Block] = []
    ins, size = 3, 224
    for stage, (width, convolutions) in enumerate(widths):
        for number in range(convolutions):
            blocks.append(_conv(f"features.{stage}.{number}", ins, width, 3, size))
            ins = width
        size //= 2
    return [
        *blocks,
        _linear("classifier.0", 512 * 7 * 7, 4096),
        _linear("classifier.3", 4096, 4096),
        _linear("classifier.6", 4096, 1000),
    ]


def resnet(depths: tuple[int, int, int, int]) -> list[Block]:
    """K. He et al., CVPR 2016, with bottlenecks; strides where torchvision has them."""
    blocks = [_conv("conv1", 3, 64, 7, 112, bias=False), _norm("bn1", 64)]
    ins = 64
    for stage, depth in enumerate(depths):
        width, size = 64 << stage, 56 >> stage
        for number in range(depth):
            at = f"layer{stage + 1}.{number}"
            before = size * 2 if stage and not number else size
            blocks += [
                _conv(f"{at}.conv1", ins, width, 1, before, bias=False),
                _norm(f"{at}.bn1", width),
                _conv(f"{at}.conv2", width, width, 3, size, bias=False),
                _norm(f"{at}.bn2", width),
                _conv(f"{at}.conv3", width, 4 * width, 1, size, bias=False),
                _norm(f"{at}.bn3", 4 * width),
            ]
            if not number:
                blocks.append(_conv(f"{at}.downsample.0", ins, 4 * width, 1, size, bias=False))
                blocks.append(_norm(f"{at}.downsample.1", 4 * width))
            ins = 4 * width
    return [*blocks, _linear("fc", ins, 1000)]


def bert(depth: int, width: int, *, tokens: int = 512) -> list[Block]:
    """J. Devlin et al., NAACL 2019: the encoder with its pooler, uncased."""
    blocks = [
        Block("embeddings", (30522 + 512 + 2) * width),
        _norm("embeddings.LayerNorm", width),
    ]
    for number in range(depth):
        at = f"encoder.{number}"
        blocks += [
            _attention(f"{at}.attention", width, tokens),
            _norm(f"{at}.attention.LayerNorm", width),
            _linear(f"{at}.intermediate", width, 4 * width, times=tokens),
            _linear(f"{at}.output", 4 * width, width, times=tokens),
            _norm(f"{at}.output.LayerNorm", width),
        ]
    return [*blocks, _linear("pooler", width, width)]


def gpt2(depth: int, width: int, *, tokens: int = 1024) -> list[Block]:
    """A. Radford et al., 2019. The output shares the weight of the token embedding.

    That weight is needed first, and its gradient complete last: so it counts as the first layer,
    and the work of the output as the last one's.
    """
    vocabulary = 50257
    blocks = [Block("wte", vocabulary * width), Block("wpe", 1024 * width)]
    for number in range(depth):
        blocks += _transformer(f"h.{number}", width, tokens, "attn", "mlp.c_fc", "mlp.c_proj")
    return [*blocks, Block("ln_f", 2 * width, vocabulary * width * tokens)]


def vit(depth: int, width: int, *, patch: int = 16) -> list[Block]:
    """A. Dosovitskiy et al., ICLR 2021, images of 224 by 224."""
    side = 224 // patch
    tokens = side * side + 1
    blocks = [
        Block("class_token", width),
        _conv("conv_proj", 3, width, patch, side),
        Block("encoder.pos_embedding", tokens * width),
    ]
    for number in range(depth):
        names = ("self_attention", "mlp.0", "mlp.3")
        blocks += _transformer(f"encoder.{number}", width, tokens, *names)
    return [*blocks, _norm("encoder.ln", width), _linear("head", width, 1000)]


def _transformer(
    at: str, width: int, tokens: int, attention: str, inner: str, outer: str
) -> list[Block]:
    """One block with its norms in front, and the names that its layers have."""
    return [
        _norm(f"{at}.ln_1", width),
        _attention(f"{at}.{attention}", width, tokens),
        _norm(f"{at}.ln_2", width),
        _linear(f"{at}.{inner}", width, 4 * width, times=tokens),
        _linear(f"{at}.{outer}", 4 * width, width, times=tokens),
    ]


def _attention(name: str, width: int, tokens: int) -> Block:
    """Four square matrices with biases, and every token beside every other, twice."""
    weight = 4 * width * width
    return Block(name, weight + 4 * width, weight * tokens + 2 * tokens * tokens * width)


MODELS: dict[str, Callable[[], list[Block]]] = {
    "alexnet": alexnet,
    "vgg16": vgg16,
    "resnet50": partial(resnet, (3, 4, 6, 3)),
    "resnet101": partial(resnet, (3, 4, 23, 3)),
    "resnet152": partial(resnet, (3, 8, 36, 3)),
    "vit-b-16": partial(vit, 12, 768),
    "vit-l-16": partial(vit, 24, 1024),
    "bert-base": partial(bert, 12, 768),
    "bert-large": partial(bert, 24, 1024),
    "gpt2-small": partial(gpt2, 12, 768),
    "gpt2-medium": partial(gpt2, 24, 1024),
    "gpt2-large": partial(gpt2, 36, 1280),
    "gpt2-xl": partial(gpt2, 48, 1600),
}
"""By name, what makes the layers, in the order of the forward pass."""

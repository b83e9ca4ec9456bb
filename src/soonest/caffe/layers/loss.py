"""Losses, softmax, and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from soonest.caffe.io.blobs import read_array
from soonest.caffe.layers.base import Layer, Shape, axis_of, count
from soonest.caffe.proto.message import Message

_LEAST_LOG = math.log(torch.finfo(torch.float32).tiny)
"""Caffe takes no chance for smaller than the smallest float32, so a loss is 87.3365 at most."""
_LEAST_LOG_OF_GAIN = math.log(1e-20)
"""The same of InfogainLoss."""


class Softmax(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        return torch.softmax(bottom, axis_of(self.spec.softmax_param.axis, bottom.dim()))


class _Capped(torch.autograd.Function):
    """Logarithms that are not below a least one; their gradient is as if they were not held."""

    @staticmethod
    def forward(ctx: Any, logs: Tensor, least: float) -> Tensor:
        return logs.clamp(min=least)

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor, None]:
        return sent[0], None


class _Labelled(Layer):
    """Something that has scores along one axis, and a label for each place beside it."""

    bottoms = (2, 2)

    def _by_place(self, scores: Tensor, labels: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Scores as (outer, classes, inner), labels as (outer, inner).

        Raises:
            ValueError: there are not as many labels as places.
        """
        axis = axis_of(axis, scores.dim())
        shape = scores.shape
        outer, inner = count(shape[:axis]), count(shape[axis + 1 :])
        if labels.numel() != outer * inner:
            raise ValueError(
                f"it has {labels.numel()} labels, but its scores of shape {list(shape)} ask for "
                f"{outer * inner}: one for each place but along axis {axis}"
            )
        return scores.reshape(outer, shape[axis], inner), labels.reshape(outer, inner).long()

    def _valid(self, labels: Tensor, ignored: int | None, classes: int) -> Tensor:
        """Which labels count.

        Raises:
            ValueError: one is out of range.
        """
        valid = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
        if labels.device.type == "cpu":
            wrong = labels[valid & ((labels < 0) | (labels >= classes))]
            if len(wrong):
                raise ValueError(
                    f"a label is {int(wrong[0])}, but there are only the classes 0 to {classes - 1}"
                )
        return valid


def _ignored(spec: Message) -> int | None:
    return spec.ignore_label if spec.has("ignore_label") else None


def _divided(total: Tensor, mode: str, valid: Tensor, *, outer: int) -> Tensor:
    """A total over places, normalised as asked for; the divisor is never below 1."""
    if mode == "VALID":
        return total / valid.sum().clamp(min=1)
    return total / max(1, {"FULL": valid.numel(), "BATCH_SIZE": outer, "NONE": 1}[mode])


def _mode(loss: Message, default: str) -> str:
    if loss.has("normalization") or not loss.has("normalize"):
        return loss.normalization if loss.has("normalization") else default
    return "VALID" if loss.normalize else "BATCH_SIZE"


class SoftmaxWithLoss(_Labelled):
    tops = (1, 2)
    is_loss = True

    def forward(self, bottom: Tensor, label: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        loss = self.spec.loss_param
        scores, labels = self._by_place(bottom, label, self.spec.softmax_param.axis)
        valid = self._valid(labels, _ignored(loss), scores.shape[1])
        logs = torch.log_softmax(scores, 1)
        chosen = logs.gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
        losses = torch.where(valid, -_Capped.apply(chosen, _LEAST_LOG), 0.0)
        total = _divided(losses.sum(), _mode(loss, "VALID"), valid, outer=len(scores))
        return total if len(self.spec.top) == 1 else (total, logs.detach().exp().view_as(bottom))


class InfogainLoss(_Labelled):
    """Takes for each label a row of a matrix, which weighs the classes; it has its own softmax."""

    bottoms = (2, 3)
    tops = (1, 2)
    is_loss = True

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self.register_buffer("matrix", None, persistent=False)
        own = spec.infogain_loss_param
        if len(shapes) == 2:
            if not own.has("source"):
                raise ValueError("its matrix is missing: give a source, or a third bottom")
            self.matrix = torch.from_numpy(read_array(own.source, "a matrix").copy())

    def forward(
        self, bottom: Tensor, label: Tensor, given: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss = self.spec.loss_param
        scores, labels = self._by_place(bottom, label, self.spec.infogain_loss_param.axis)
        classes = scores.shape[1]
        matrix = self.matrix if given is None else given
        if matrix.numel() != classes * classes:
            raise ValueError(
                f"its matrix has {matrix.numel()} values, but {classes} classes ask for "
                f"{classes * classes}"
            )
        valid = self._valid(labels, _ignored(loss), classes)
        logs = torch.log_softmax(scores, 1)
        # By place: the row of its label, in which ignored places have zeros.
        weights = matrix.detach().to(logs.device).reshape(classes, classes)
        rows = weights[torch.where(valid, labels, 0)].movedim(-1, 1) * valid.unsqueeze(1)
        losses = -(rows * _Capped.apply(logs, _LEAST_LOG_OF_GAIN)).sum()
        total = _divided(losses, _mode(loss, "VALID"), valid, outer=len(scores))
        return total if len(self.spec.top) == 1 else (total, logs.detach().exp().view_as(bottom))


class MultinomialLogisticLoss(_Labelled):
    is_loss = True

    def forward(self, bottom: Tensor, label: Tensor) -> Tensor:
        chances, labels = self._by_place(bottom, label, 1)
        self._valid(labels, None, chances.shape[1])
        chosen = chances.gather(1, labels.unsqueeze(1))
        return -chosen.clamp(min=1e-20).log().sum() / bottom.shape[0]


class HingeLoss(_Labelled):
    is_loss = True

    def forward(self, bottom: Tensor, label: Tensor) -> Tensor:
        scores, labels = self._by_place(bottom.reshape(bottom.shape[0], -1), label, 1)
        classes = scores.shape[1]
        self._valid(labels, None, classes)
        own = functional.one_hot(labels, classes).movedim(-1, 1).to(scores.dtype)
        margin = (1 + scores * (1 - 2 * own)).relu()
        if self.spec.hinge_loss_param.norm == "L2":
            margin = margin * margin
        return margin.sum() / bottom.shape[0]


class EuclideanLoss(Layer):
    bottoms = (2, 2)
    is_loss = True

    def forward(self, bottom: Tensor, other: Tensor) -> Tensor:
        _same_count(bottom, other)
        difference = bottom.flatten() - other.flatten()
        return difference.dot(difference) / (2 * bottom.shape[0])


class SigmoidCrossEntropyLoss(Layer):
    bottoms = (2, 2)
    is_loss = True

    def forward(self, bottom: Tensor, target: Tensor) -> Tensor:
        _same_count(bottom, target)
        target = target.reshape(bottom.shape)
        ignored = _ignored(self.spec.loss_param)
        valid = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
        losses = functional.binary_cross_entropy_with_logits(bottom, target, reduction="none")
        losses = torch.where(valid, losses, 0.0)
        mode = _mode(self.spec.loss_param, "BATCH_SIZE")
        return _divided(losses.sum(), mode, valid, outer=bottom.shape[0])


class ContrastiveLoss(Layer):
    """Draws like pairs together and pushes unlike ones apart, up to a margin."""

    bottoms = (3, 3)
    is_loss = True

    def forward(self, first: Tensor, second: Tensor, alike: Tensor) -> Tensor:
        own = self.spec.contrastive_loss_param
        _same_count(first, second)
        squares = (first - second).flatten(1).pow(2).sum(1)
        alike = alike.flatten() != 0
        if own.legacy_version:
            apart = (own.margin - squares).relu()
        else:
            # Caffe's gradient divides by the distance plus 1e-4; so the value comes from here and
            # the gradient from there.
            distance = squares.detach().sqrt()
            missing = (own.margin - distance).clamp(min=0)
            slope = -missing / (distance + 1e-4) * squares
            apart = missing * missing + (slope - slope.detach())
        return torch.where(alike, squares, apart).sum() / (2 * first.shape[0])


def _same_count(first: Tensor, second: Tensor) -> None:
    if first.shape[:1] != second.shape[:1] or first.numel() != second.numel():
        raise ValueError(
            f"its bottoms have the shapes {list(first.shape)} and {list(second.shape)}: they must "
            "hold equally many values"
        )


class Accuracy(_Labelled):
    """How often the label is among the best; an equal score counts as a better one."""

    tops = (1, 2)

    @torch.no_grad()
    def forward(self, bottom: Tensor, label: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        own = self.spec.accuracy_param
        scores, labels = self._by_place(bottom, label, own.axis)
        classes = scores.shape[1]
        if not 1 <= own.top_k <= classes:
            raise ValueError(f"its top_k is {own.top_k}: give 1 to {classes}")
        valid = self._valid(labels, _ignored(own), classes)
        safe = torch.where(valid, labels, 0)
        better = (scores >= scores.gather(1, safe.unsqueeze(1))).sum(1) - 1
        hit = ((better < own.top_k) & valid).to(scores.dtype)
        share = hit.sum() / valid.sum().clamp(min=1)
        if len(self.spec.top) == 1:
            return share
        zeros = hit.new_zeros(classes)
        hits = zeros.index_add(0, safe.flatten(), hit.flatten())
        seen = zeros.index_add(0, safe.flatten(), valid.flatten().to(hit.dtype))
        return share, hits / seen.clamp(min=1)

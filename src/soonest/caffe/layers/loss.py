"""Losses, softmax, and accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from soonest.caffe.layers.base import Layer, Shape, axis_of, count
from soonest.caffe.message import Message

_LEAST_LOG = math.log(torch.finfo(torch.float32).tiny)
"""Caffe takes no chance for smaller than the smallest float32, so a loss is 87.3365 at most."""


class Softmax(Layer):
    def forward(self, bottom: Tensor) -> Tensor:
        return torch.softmax(bottom, axis_of(self.spec.softmax_param.axis, bottom.dim()))


class _Labelled(Layer):
    """Something that has scores along one axis, and a label for each place beside it."""

    bottoms = (2, 2)

    def _prepare(self, shapes: Sequence[Shape], axis: int) -> None:
        scores, labels = shapes
        self.axis = axis_of(axis, len(scores))
        self.outer = count(scores[: self.axis])
        self.inner = count(scores[self.axis + 1 :])
        self.classes = scores[self.axis]
        if count(labels) != self.outer * self.inner:
            raise ValueError(
                f"it has {count(labels)} labels, but its scores of shape {list(scores)} ask for "
                f"{self.outer * self.inner}: one for each place but along axis {self.axis}"
            )

    def _by_place(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Scores as (outer, classes, inner), labels as (outer, inner)."""
        shape = (self.outer, self.classes, self.inner)
        return scores.reshape(shape), labels.reshape(self.outer, self.inner).long()

    def _valid(self, labels: Tensor, ignored: int | None) -> Tensor:
        """Which labels count.

        Raises:
            ValueError: one is out of range.
        """
        valid = torch.ones_like(labels, dtype=torch.bool) if ignored is None else labels != ignored
        if labels.device.type == "cpu":
            wrong = labels[valid & ((labels < 0) | (labels >= self.classes))]
            if len(wrong):
                raise ValueError(
                    f"a label is {int(wrong[0])}, but there are only the classes 0 to "
                    f"{self.classes - 1}"
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

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self._prepare(shapes, spec.softmax_param.axis)
        self.ignored = _ignored(spec.loss_param)
        self.mode = _mode(spec.loss_param, "VALID")

    def forward(self, bottom: Tensor, label: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        scores, labels = self._by_place(bottom, label)
        valid = self._valid(labels, self.ignored)
        logs = torch.log_softmax(scores, 1)
        chosen = logs.gather(1, torch.where(valid, labels, 0).unsqueeze(1)).squeeze(1)
        capped = chosen.detach().clamp(min=_LEAST_LOG)
        chosen = chosen + (capped - chosen.detach())  # The gradient is not capped.
        total = -torch.where(valid, chosen, 0.0).sum()
        loss = _divided(total, self.mode, valid, outer=self.outer)
        return loss if len(self.spec.top) == 1 else (loss, logs.detach().exp().view_as(bottom))


class MultinomialLogisticLoss(_Labelled):
    is_loss = True

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self._prepare(shapes, 1)

    def forward(self, bottom: Tensor, label: Tensor) -> Tensor:
        chances, labels = self._by_place(bottom, label)
        self._valid(labels, None)
        chosen = chances.gather(1, labels.unsqueeze(1))
        return -chosen.clamp(min=1e-20).log().sum() / bottom.shape[0]


class HingeLoss(_Labelled):
    is_loss = True

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        self._prepare([(shapes[0][0], count(shapes[0][1:])), shapes[1]], 1)

    def forward(self, bottom: Tensor, label: Tensor) -> Tensor:
        scores, labels = self._by_place(bottom, label)
        self._valid(labels, None)
        own = functional.one_hot(labels, self.classes).movedim(-1, 1).to(scores.dtype)
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

    def __init__(self, spec: Message, shapes: Sequence[Shape], phase: str) -> None:
        super().__init__(spec, shapes, phase)
        own = spec.accuracy_param
        self._prepare(shapes, own.axis)
        self.top_k, self.ignored = own.top_k, _ignored(own)
        if not 1 <= self.top_k <= self.classes:
            raise ValueError(f"its top_k is {self.top_k}: give 1 to {self.classes}")

    @torch.no_grad()
    def forward(self, bottom: Tensor, label: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        scores, labels = self._by_place(bottom, label)
        valid = self._valid(labels, self.ignored)
        safe = torch.where(valid, labels, 0)
        own = scores.gather(1, safe.unsqueeze(1))
        better = (scores >= own).sum(1) - 1
        hit = ((better < self.top_k) & valid).to(scores.dtype)
        share = hit.sum() / valid.sum().clamp(min=1)
        if len(self.spec.top) == 1:
            return share
        zeros = hit.new_zeros(self.classes)
        hits = zeros.index_add(0, safe.flatten(), hit.flatten())
        seen = zeros.index_add(0, safe.flatten(), valid.flatten().to(hit.dtype))
        return share, hits / seen.clamp(min=1)

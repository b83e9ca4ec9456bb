"""Layers that pick items of a batch."""

from __future__ import annotations

from torch import Tensor

from soonest.caffe.layers.base import MANY, Layer


class Filter(Layer):
    """Keeps the items for which its last bottom is not 0, of each of the others."""

    bottoms = (2, MANY)
    tops = (1, MANY)

    def infer(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        """All items: which are kept only values say."""
        self._check(*bottoms)
        return bottoms[:-1]

    def forward(self, *bottoms: Tensor) -> tuple[Tensor, ...]:
        self._check(*bottoms)
        chosen = bottoms[-1].detach().flatten() != 0
        return tuple(bottom[chosen] for bottom in bottoms[:-1])

    def _check(self, *bottoms: Tensor) -> None:
        *others, selector = bottoms
        items = selector.shape[0] if selector.dim() else 0
        if selector.numel() != items:
            raise ValueError(
                f"its last bottom selects items, so it has one value for each, not the shape "
                f"{list(selector.shape)}"
            )
        if len(others) != len(self.spec.top):
            raise ValueError(f"give {len(others)} tops: one for each bottom but the last")
        for number, other in enumerate(others):
            if other.shape[:1] != (items,):
                raise ValueError(
                    f"its bottom {number} has the shape {list(other.shape)}, but its last bottom "
                    f"selects from {items} items"
                )


class BatchReindex(Layer):
    """The items that its second bottom numbers, in that order; an item may come more than once."""

    bottoms = (2, 2)

    def forward(self, bottom: Tensor, order: Tensor) -> Tensor:
        if order.dim() != 1:
            raise ValueError(f"its second bottom must have one axis, not {list(order.shape)}")
        numbers, items = order.detach().long(), bottom.shape[0]
        if numbers.device.type == "cpu":
            wrong = numbers[(numbers < 0) | (numbers >= items)]
            if len(wrong):
                raise ValueError(
                    f"its second bottom asks for item {int(wrong[0])}, but there are only "
                    f"{items}, from 0 on"
                )
        return bottom[numbers]

"""Which layers of a definition a net has: rules by phase, level and stage."""

from __future__ import annotations

from soonest.caffe.proto.message import Message


def chosen(net: Message, state: Message) -> list[Message]:
    """The layers that a net has in a state.

    Args:
        net: the ``NetParameter``.
        state: the ``NetState``: phase, level and stages.

    Raises:
        ValueError: a layer has both kinds of rules.
    """
    return [layer for layer in net.layer if _included(layer, state)]


def _included(layer: Message, state: Message) -> bool:
    if layer.has("include") and layer.has("exclude"):
        raise ValueError(
            f"layer {layer.name!r}{f' (line {layer.line})' if layer.line else ''} has both include "
            "and exclude rules: give one kind"
        )
    if layer.has("include"):
        return any(meets(state, rule) for rule in layer.include)
    return not any(meets(state, rule) for rule in layer.exclude)


def meets(state: Message, rule: Message) -> bool:
    """Whether a state meets all that a ``NetStateRule`` asks for."""
    return (
        (not rule.has("phase") or rule.phase == state.phase)
        and (not rule.has("min_level") or state.level >= rule.min_level)
        and (not rule.has("max_level") or state.level <= rule.max_level)
        and all(stage in state.stage for stage in rule.stage)
        and not any(stage in state.stage for stage in rule.not_stage)
    )

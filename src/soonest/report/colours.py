"""Colours of layers by how soon the forward pass needs them, on paper and in a terminal."""

from __future__ import annotations

Rgb = tuple[float, float, float]
"""Red, green and blue, 0 to 1."""

INK: Rgb = (0.13, 0.14, 0.16)
WHITE: Rgb = (1.0, 1.0, 1.0)
GREY: Rgb = (0.79, 0.81, 0.84)
RED: Rgb = (0.99, 0.92, 0.90)
"""Light, for waiting."""

# Viridis without its very ends: even steps for the eye, also for a colour-blind one and in grey.
_ANCHORS = (
    *("#471063", "#453581", "#38588c", "#2b748e", "#21918c"),
    *("#25ac82", "#52c569", "#98d83e", "#e5e419"),
)
_RGB: list[Rgb] = [
    (int(a[1:3], 16) / 255, int(a[3:5], 16) / 255, int(a[5:], 16) / 255) for a in _ANCHORS
]


def of_place(place: float, *, pale: bool = False) -> Rgb:
    """Dark for 0.0, needed first, bright for 1.0, needed last; ``pale`` in the backward pass."""
    at = min(max(place, 0.0), 1.0) * (len(_RGB) - 1)
    low = min(int(at), len(_RGB) - 2)
    colour = mix(_RGB[low], _RGB[low + 1], at - low)
    return mix(colour, WHITE, 0.45) if pale else colour


def mix(one: Rgb, other: Rgb, share: float) -> Rgb:
    """``share`` of the other colour, the rest of the one."""
    red, green, blue = (a + (b - a) * share for a, b in zip(one, other, strict=True))
    return red, green, blue


def contrast(behind: Rgb) -> Rgb:
    """A colour to write in on another."""
    red, green, blue = behind
    return WHITE if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK

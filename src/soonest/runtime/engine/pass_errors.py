"""What is wrong with a backward pass, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from soonest.errors import SoonestError
from soonest.runtime.execute.pass_state import PassState
from soonest.runtime.flat.param import FlatParam

_NAMED = 3


def unfinished(pass_state: PassState, params: Sequence[FlatParam]) -> SoonestError:
    """The error for a backward pass that has begun and will never end.

    Args:
        pass_state: of that pass.
        params: all that it should have given a gradient.
    """
    missing = [m.name for m in params if math.isnan(pass_state.record.ready[m.order])]
    names = ", ".join(missing[:_NAMED]) + (" and more" if len(missing) > _NAMED else "")
    return SoonestError(
        f"backward pass {pass_state.number} did not finish (did backward() raise?): this rank has "
        f"not sent the gradients of {names or 'any parameter twice'}, and the others wait for "
        "them; restart from a checkpoint"
    )


def repeated(param: FlatParam) -> SoonestError:
    """The error for a gradient that comes after the parameter's had been sent as its only one."""
    return SoonestError(
        f"{param.name!r} got a second gradient in one backward pass, from a checkpoint, when its "
        "only one so far was sent already: give torch.utils.checkpoint use_reentrant=False"
    )

"""What soonest raises besides ``ValueError``."""


class SoonestError(RuntimeError):
    """Training cannot go on as it was; the message says why and what to do."""


class PlanMismatchError(SoonestError):
    """The ranks do not agree on the model or the plan; the message names the first difference."""


class PeerLostError(SoonestError):
    """A collective failed or timed out; the message names bucket, layers and the ranks at fault."""


class ReadTooEarlyError(SoonestError):
    """A gradient was read inside the backward pass, before it could be reduced over the ranks."""

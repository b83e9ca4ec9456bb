"""A cluster in one machine: emulated hosts, shaped links, replayed compute."""

from soonest.lab.hosts import Lab
from soonest.lab.links import PAYLOAD_SHARE
from soonest.lab.loopback import Loopback
from soonest.lab.requirements import unavailable

__all__ = ["PAYLOAD_SHARE", "Lab", "Loopback", "unavailable"]

"""A cluster in one machine: emulated hosts, shaped links, replayed compute."""

from soonest.lab.hosts import PAYLOAD_SHARE, Lab, unavailable
from soonest.lab.loopback import Loopback

__all__ = ["PAYLOAD_SHARE", "Lab", "Loopback", "unavailable"]

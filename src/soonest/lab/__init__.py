"""A cluster in one machine: emulated hosts, shaped links, replayed compute."""

from soonest.lab.hosts import Lab, unavailable
from soonest.lab.loopback import Loopback

__all__ = ["Lab", "Loopback", "unavailable"]

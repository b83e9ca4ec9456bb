"""How training by priority begins, and on what the ranks agree before."""

from soonest.runtime.setup.assembly import WINDOW, build
from soonest.runtime.setup.request import AfterStep, TrainingPart

__all__ = ["WINDOW", "AfterStep", "TrainingPart", "build"]

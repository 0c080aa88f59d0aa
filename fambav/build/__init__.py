"""From settings to objects: the one place that knows both.

Config -> plan -> data -> run folder -> model -> update -> fit
"""

from fambav.build.jobs import run
from fambav.build.network import model, reduction, schedule
from fambav.build.prediction import from_pretrained, predict
from fambav.build.saved import record

__all__ = ["from_pretrained", "model", "predict", "record", "reduction", "run", "schedule"]

"""From settings to objects: the one place that knows both.

Config -> plan -> data -> model -> step -> trainer -> run folder
"""

from fambav.training.inference import from_pretrained, predict
from fambav.training.job import run
from fambav.training.network import model, reduction, schedule
from fambav.training.run_state import record

__all__ = ["from_pretrained", "model", "predict", "record", "reduction", "run", "schedule"]

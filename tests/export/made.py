"""Checkpoints with new weights, as a run would leave them."""

import torch

from fambav import training
from fambav.config import Config
from fambav.engine import checkpoint

NAMES = [f"digit {n}" for n in range(10)]


def weights(path, model="vim_micro", *, classes=10, **settings):
    """Save new weights whose tokens differ, and return the model in evaluation mode."""
    config = Config.from_flat(
        {"model": model, "data_set": "DIGITS", "num_classes": classes, **settings}
    )
    torch.manual_seed(0)
    net = training.model(config, num_classes=classes).eval()
    known = {
        "config": config.flat(),
        "class_token": config.model.class_token,
        "class_names": NAMES if classes == 10 else None,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    checkpoint.save(path, {"model": net.state_dict(), **known})
    return net

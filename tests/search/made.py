"""Problems with made-up losses, and a small model in a file."""

from pathlib import Path

from fambav import training
from fambav.config import Config
from fambav.data import load
from fambav.engine import checkpoint
from fambav.search.space import Problem, uniform_strategies
from fambav.seeding import seed_all
from fambav.training import run_state


def problem(weights, *, length=9, share=0.6, power=1.5, savings=None, seen=None):
    """Removing c tokens at layer n loses weights[n] * c ** power and saves c at all layers behind.

    As many tokens can go at a layer as are left, but for one.  With savings, c saves so many times
    c instead.
    """
    depth = len(weights)
    whole = depth * length
    each = savings or range(depth, 0, -1)

    def cost(counts):
        return (whole - sum(c * saved for c, saved in zip(counts, each, strict=True))) / whole

    def losses(plans):
        if seen is not None:
            seen.extend(plans)
        return [sum(w * c**power for w, c in zip(weights, plan, strict=True)) for plan in plans]

    return Problem(
        unreduced=(0,) * depth,
        length=length,
        fits=lambda counts: sum(counts) < length and min(counts) >= 0,
        cost=cost,
        losses=losses,
        most=share,
        strategies=list(uniform_strategies(depth, length)),
    )


def weights(folder: Path, **settings) -> Path:
    """Write the weights of a small untrained model of digits, 17 tokens and 6 layers, to a file."""
    config = Config.from_flat(
        {
            "model": "vim_micro",
            "data_set": "DIGITS",
            "data_stats": "own",
            "patch_size": 8,
            "num_workers": 0,
            "threads": 1,
            **settings,
        }
    )
    found = load("DIGITS")
    complete = config.replace(num_classes=found.num_classes, input_size=32)
    seed_all(0)
    net = training.model(complete, num_classes=found.num_classes)
    # Drawn larger than a new head's, so that plans differ in what the model says.
    net.head.weight.data.mul_(50)
    known = run_state.facts(complete, found, None, images=64)
    path = folder / "weights.pth"
    checkpoint.save(path, {"model": net.state_dict(), **known})
    return path

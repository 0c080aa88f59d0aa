"""Numbers that the official models give, and the formula that makes their weights and inputs.

Each weight is a fixed hash of its state_dict key, so no weight file is needed: `hashed` gives
numbers in [-1, 1), `weights` scales them as each kind of parameter needs.  The `.npz` files hold
outputs of the unmodified official code (hustvl/Vim, AIoT-MLSys-Lab/Famba-V with its fusion lines
enabled, ChenhongyiYang/PlainMamba, MzeroMiko/VMamba, YuHengsss/VSSD, Amshaker/GroupMamba) on the
CPU in float32, or of a float64 scan where the name begins with `scan`.  Sets at full width have
weights and images of sines instead.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent


def load(name):
    """Return the arrays and the description of one set."""
    with np.load(HERE / f"{name}.npz") as arrays:
        out = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return out, json.loads((HERE / f"{name}.json").read_text())


def hashed(name, *shape, dtype=torch.float32):
    """Numbers in [-1, 1) that depend on nothing but `name` and the place."""
    with np.errstate(over="ignore"):
        i = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64)
        key = np.uint64(zlib.crc32(name.encode("ascii")))
        x = key * np.uint64(0xD1B54A32D192ED03) + i * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    value = (x >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
    return torch.from_numpy(value.reshape(shape)).to(dtype)


def images(keys, height, width=None):
    """Stack one image per key, (len(keys), 3, height, width)."""
    return torch.stack([hashed(f"img:{key}", 3, height, width or height) for key in keys])


def weight(key, shape):
    """The value of the parameter `key`, float32."""
    s, last = hashed(key, *shape, dtype=torch.float64), key.rsplit(".", 1)[-1]
    if last == "A_log" and len(shape) == 1:  # of heads
        value = math.log(4) + 0.25 * s
    elif last in ("A_log", "A_b_log", "A_logs"):
        value = torch.arange(1, shape[-1] + 1, dtype=torch.float64).log() + 0.25 * s
    elif last in ("D", "D_b", "Ds"):
        value = 1 + 0.25 * s
    elif key.endswith(("dt_proj.bias", "dt_proj_b.bias", "dt_projs_bias", "dt_bias")):
        value = s - 2
    elif last == "skip_scale":
        value = 1 + 0.2 * s
    elif last in ("x_proj_weight", "dt_projs_weight"):
        value = s * (3 / shape[-1]) ** 0.5
    elif last == "running_var":
        value = 1 + 0.4 * s
    elif last in ("pos_embed", "cls_token", "cls_token_head", "cls_token_tail"):
        value = s
    elif len(shape) <= 1:
        value = 1 + 0.2 * s if last == "weight" else 0.2 * s
    else:
        value = s * (3 / float(np.prod(shape[1:]))) ** 0.5
    return value.float()


def wave(key, shape):
    """The value of the parameter `key` in the sets at full width, float32."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    s = np.sin(0.7 * i + (zlib.crc32(key.encode("ascii")) % 10007) * 0.01).reshape(shape)
    if key.endswith(".running_var"):
        value = 1 + 0.5 * s**2
    elif key.endswith("A_logs"):
        value = 0.1 * s
    elif key.endswith("dt_projs_bias"):
        value = 0.1 * s - 2
    elif len(shape) <= 1:
        value = 1 + 0.1 * s if key.endswith(".weight") else 0.1 * s
    else:
        value = s * (2 / (shape[-1] if len(shape) == 3 else np.prod(shape[1:]))) ** 0.5
    return torch.from_numpy(value).float()


def wave_images(batch, height, width):
    """The images of the sets at full width, (batch, 3, height, width)."""
    b, c, y, x = np.ogrid[:batch, :3, :height, :width]
    value = np.sin(0.05 * y + 0.11 * x + 1.7 * c + 0.9 * b) + 0.3 * np.cos(0.23 * (y * x % 97) + b)
    return torch.from_numpy(value).float()


def fill(module, rule=weight):
    """Give every parameter of `module` its golden value, and return the module."""
    module.load_state_dict(
        {
            key: rule(key, tuple(value.shape)) if value.is_floating_point() else value * 0
            for key, value in module.state_dict().items()
        }
    )
    return module.eval()

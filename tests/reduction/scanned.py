"""Tokens with intermediates of a mixer, and small models."""

import timm
import torch

import fambav.models  # noqa: F401  registers them
from fambav.layers import Intermediates, Tokens
from fambav.ops.bimamba import token_score
from fambav.ops.fused_bimamba import SCORES

IMAGES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def scanned(length=9, *, cls_index=(4,), batch=2, inner=6, directions=2, **intermediates):
    """Random tokens and intermediates; some may be given, and scores follow from y and z."""
    torch.manual_seed(0)
    wide = batch, directions, length, inner
    x, residual = torch.randn(2, batch, length, 8)
    forward = torch.arange(length)
    made = dict(
        order=torch.stack((forward, forward.flip(0))[:directions])[None],
        delta=torch.rand(wide) + 0.01,
        y=torch.randn(wide),
        z=torch.randn(batch, length, inner),
        mixed=x,
    )
    made |= intermediates
    z = made["z"][:, None]
    made |= {name: token_score(made["y"], z, name)[..., None] for name in SCORES}
    start = Tokens.start(x, cls_index=cls_index, trace=True)
    return start._replace(residual=residual, intermediates=Intermediates(**made))


def vim(**arguments):
    """A Vim of 4 layers and 16 patches, with a class token at place 8, in evaluation."""
    torch.manual_seed(0)
    sizes = dict(num_classes=5, img_size=32, patch_size=8, depth=4, dim=16)
    return timm.create_model("vim_micro", **(sizes | arguments)).eval()


def dropped(tokens, fewer):
    """Positions that are no longer there, a list for each sample."""
    pairs = zip(tokens.position.tolist(), fewer.position.tolist(), strict=True)
    return [sorted(set(before) - set(after)) for before, after in pairs]

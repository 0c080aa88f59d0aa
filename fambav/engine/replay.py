"""Forward and backward pass as CUDA graphs: every kernel of a pass in one launch.

At short sequences, which token fusion makes, launching hundreds of small kernels takes longer than
running them.  A plan removes the same number of tokens from every image, so each pass launches the
same kernels on the same memory, and can be recorded once.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fambav.engine.runtime import Precision
from fambav.layers.drop import current, shard


class Replayed(nn.Module):
    """A model whose passes over batches of one shape are replayed; all others run as ever.

    What is drawn inside comes from the device's generator, which replays read afresh, and the shard
    of `fambav.layers.drop` from a tensor that is set before each replay, so a replay draws what the
    model itself would draw from the same seed.  Gradients lie where the next replay writes its own.

    Args:
        net: The model, on its device and in the mode that it will train in.
        shape: Of the images in a batch, (batch, channels, height, width).
        precision: Format of the forward pass.
        shards: Shards of a global batch.
        accumulating: Whether gradients of several replays are added up, and so must be copied.
    """

    def __init__(
        self,
        net: nn.Module,
        shape: tuple[int, ...],
        *,
        precision: Precision,
        shards: int = 1,
        accumulating: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self._shape, self._shards, self._mode = torch.Size(shape), shards, net.training
        self._shard = torch.zeros(1, dtype=torch.int64, device=precision.device)
        images = torch.zeros(shape, device=precision.device)
        recorded = _Recorded(net)
        # Recording leaves behind nodes that belong to its own stream, of which newer torch warns;
        # they cost one wait at the end of a backward pass.
        quiet = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if quiet is not None:
            quiet(enabled=False)
        # A weight that autocast has converted before would not be converted again in a replay.
        with shard(self._shard, shards), precision.autocast(cached=False):
            self._replay = torch.cuda.make_graphed_callables(recorded, (images,))
        if accumulating:  # a replay would write over the sum, which is where its gradient was
            for parameter in net.parameters():
                parameter.register_hook(torch.clone)

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits."""
        index, count = current()
        recorded = self._shape, self._shards, self._mode
        if not torch.is_grad_enabled() or (images.shape, count, self.training) != recorded:
            logits: Tensor = self.net(images)
            return logits
        self._shard.fill_(index)
        return cast(Tensor, self._replay(images))


class _Recorded(nn.Module):
    """A module of its own, since recording replaces a module's `forward`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.train(net.training)

    def forward(self, images: Tensor) -> Tensor:
        """Do what the model does."""
        logits: Tensor = self.net(images)
        return logits

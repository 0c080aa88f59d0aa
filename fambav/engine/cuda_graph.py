"""Forward and backward pass as CUDA graphs: every kernel of a pass in one launch.

At short sequences, which token fusion makes, launching hundreds of small kernels takes longer than
running them.  A plan removes the same number of tokens from every image, so each pass launches the
same kernels on the same memory, and can be captured once.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fambav.engine.precision import Precision
from fambav.layers.drop import current, shard


class CudaGraph(nn.Module):
    """A model whose passes over batches of one shape are replayed; all others run eagerly.

    Random numbers come from the device's generator, whose state replays read afresh, and the shard
    of `fambav.layers.drop` from a tensor that is set before each replay, so a replay draws what the
    model itself would draw from the same seed.  Each replay overwrites the gradients of the last.

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
        captured = _Captured(net)
        # Capture leaves behind nodes of its own stream, of which newer torch warns; they cost one
        # synchronization at the end of a backward pass.
        quiet = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
        if quiet is not None:
            quiet(enabled=False)
        # A weight that autocast has cached before capture would not be converted in a replay.
        with shard(self._shard, shards), precision.autocast(cached=False):
            self._replay = torch.cuda.make_graphed_callables(captured, (images,))
        if accumulating:  # else a replay would overwrite the sum, which lies in its gradient
            for parameter in net.parameters():
                parameter.register_hook(torch.clone)

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits."""
        index, count = current()
        captured = self._shape, self._shards, self._mode
        if not torch.is_grad_enabled() or (images.shape, count, self.training) != captured:
            logits: Tensor = self.net(images)
            return logits
        self._shard.fill_(index)
        return cast(Tensor, self._replay(images))


class _Captured(nn.Module):
    """A module of its own, since capture replaces a module's `forward`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.train(net.training)

    def forward(self, images: Tensor) -> Tensor:
        """Call the model."""
        logits: Tensor = self.net(images)
        return logits

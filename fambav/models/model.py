"""What models of every task have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class Model(nn.Module):
    """A model of ours, as timm and training loops know one.

    Attributes:
        num_classes: Length of the output; 0 for none.
        pretrained_cfg: What is read and returned, in timm's words.
        classifier_name: Name of the module that gives the output.
        undecayed: Last names of the parameters that weight decay would pull away from what they
            mean.
        draws_whole_update: Whether a forward pass draws random numbers for all batches of an
            update and keeps its share, so that all batches start from one seed.
    """

    classifier_name: ClassVar[str] = "head"
    undecayed: ClassVar[tuple[str, ...]] = ()
    draws_whole_update: bool = True
    num_classes: int
    pretrained_cfg: dict[str, Any]

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """Names of all modules that have an output for each class."""
        return (self.classifier_name,)

    def get_classifier(self) -> nn.Module:
        """Return the linear map that gives the output."""
        return self.get_submodule(self.classifier_name)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that weight decay would pull away from what they mean."""
        return {
            name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in self.undecayed
        }

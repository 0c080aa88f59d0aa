"""Modules that two or more models are made of."""

from fambav.layers.block import Add, AddNorm, Block, Hooks, ResidualBlock
from fambav.layers.drop import Dropout, DropPath, shard
from fambav.layers.embed import PatchEmbed
from fambav.layers.info import BackboneInfo, Stage
from fambav.layers.mamba import Mamba
from fambav.layers.mamba2d import Mamba2D
from fambav.layers.tokens import INTERMEDIATES, OUTPUT, Intermediates, Tokens

__all__ = [
    "INTERMEDIATES",
    "OUTPUT",
    "Add",
    "AddNorm",
    "BackboneInfo",
    "Block",
    "DropPath",
    "Dropout",
    "Hooks",
    "Intermediates",
    "Mamba",
    "Mamba2D",
    "PatchEmbed",
    "ResidualBlock",
    "Stage",
    "Tokens",
    "shard",
]

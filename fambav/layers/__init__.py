"""Modules that two or more models are made of."""

from fambav.layers.block import AddNorm, Block
from fambav.layers.drop import Dropout, DropPath, shard
from fambav.layers.embed import PatchEmbed
from fambav.layers.mamba import Mamba
from fambav.layers.tokens import Tokens

__all__ = ["AddNorm", "Block", "DropPath", "Dropout", "Mamba", "PatchEmbed", "Tokens", "shard"]

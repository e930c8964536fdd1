"""Mixers: residual stream and output of an MoE layer -> residual stream."""

from moetrain.moe.mixers import momentum
from moetrain.moe.mixers.base import Mixer, Residual, ResidualConfig

__all__ = ["Mixer", "Residual", "ResidualConfig", "momentum"]

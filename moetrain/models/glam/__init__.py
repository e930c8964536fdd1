"""GLaM."""

from moetrain.models.glam.config import GLaMConfig

__all__ = ["GLaMConfig"]

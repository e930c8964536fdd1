"""moetrain: trains sparse Mixture-of-Experts models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("moetrain")
except PackageNotFoundError:  # used from a checkout without installation
    __version__ = "0.0.0+unknown"

"""Importing this module registers every component that comes with moetrain, and those of installed plugins.

A plugin is a package with an entry point in the group ``moetrain.plugins`` that names a module to import.
"""

from importlib.metadata import entry_points

import moetrain.data
import moetrain.models
import moetrain.moe.capacity
import moetrain.moe.dropout
import moetrain.moe.experts
import moetrain.moe.losses
import moetrain.moe.mixers
import moetrain.moe.routers
import moetrain.objectives
import moetrain.parallel.layouts
import moetrain.train.optim  # noqa: F401

for _plugin in entry_points(group="moetrain.plugins"):
    _plugin.load()

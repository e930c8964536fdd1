"""Which rank this process is, of how many, on which device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moetrain.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """rank of world_size processes; local_rank of local_world_size on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def detect(cls, environ: Mapping[str, str] = os.environ) -> Ranks:
        """From torchrun's variables; a single process without them. (SLURM's own launcher goes through torchrun.)"""
        if "RANK" not in environ or "WORLD_SIZE" not in environ:
            return cls()
        return cls(
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", 0)),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", environ["WORLD_SIZE"])),
        )

    def data_parallel(self, tensor: int) -> Ranks:
        """This rank's place among data-parallel ranks: ``tensor`` neighbours share their micro-batches and count as one."""
        return replace(self, rank=self.rank // tensor, world_size=self.world_size // tensor)

    def device(self, choice: str = "auto") -> torch.device:
        """The device of this rank. choice: auto, cpu or cuda. Raises ConfigError if that GPU is not there."""
        if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"device = {choice}: rank {self.rank} needs GPU {self.local_rank} of this machine, which has {torch.cuda.device_count()}"
            )
        return torch.device("cuda", self.local_rank)

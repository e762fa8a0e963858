"""Teams of ranks that train a model of their own at the same time, each a ZeRO world of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gapfx.runtime.ranks import Peers


@dataclass(frozen=True)
class Team:
    """Team `index` of `count`; `peers` are the ranks in it. `mpu` tells DeepSpeed so, None when it is all ranks."""

    peers: Peers
    index: int = 0
    count: int = 1
    mpu: Any = None


def all_in_one_team() -> Team:
    """Every rank trains the same model."""
    return Team(Peers.all())


def teams_for(replicas: int) -> Team:
    """The team of this rank, of as many equal ones as divide both the replicas and the ranks (collective).

    With fewer teams than replicas each trains several of them in turn.
    """
    everyone = Peers.all()
    count = max(n for n in range(1, replicas + 1) if replicas % n == 0 and everyone.size % n == 0)
    if count == 1:
        return all_in_one_team()
    size = everyone.size // count
    # Every rank makes every group, in the same order.
    teams = [torch.distributed.new_group([team * size + member for member in range(size)]) for team in range(count)]
    alone = [torch.distributed.new_group([rank]) for rank in range(everyone.size)]
    index, rank = divmod(everyone.rank, size)
    ranks = [index * size + member for member in range(size)]
    mpu = _Mpu(teams[index], alone[everyone.rank], rank, ranks)
    return Team(Peers(rank, size, teams[index]), index, count, mpu)


@dataclass(frozen=True)
class _Mpu:
    """What DeepSpeed asks a "model parallel unit": the team shares data; nobody shares layers.

    Gradient norms are added up over the model-parallel group, so that must hold this rank alone.
    """

    group: Any
    alone: Any
    rank: int
    ranks: list[int]

    def get_data_parallel_group(self) -> Any:
        """The team."""
        return self.group

    def get_data_parallel_world_size(self) -> int:
        """Ranks in the team."""
        return len(self.ranks)

    def get_data_parallel_rank(self) -> int:
        """Place in the team."""
        return self.rank

    def get_data_parallel_group_ranks(self) -> list[int]:
        """The team by ranks of the run."""
        return self.ranks

    def get_model_parallel_group(self) -> Any:
        """This rank alone."""
        return self.alone

    def get_model_parallel_world_size(self) -> int:
        """One."""
        return 1

    def get_model_parallel_rank(self) -> int:
        """First and only."""
        return 0

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

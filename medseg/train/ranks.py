"""Several processes that train one network together, each on its share of every batch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from medseg.core.errors import InputError

# Others wait this long while the first one validates.
_PATIENCE = timedelta(hours=4)


@dataclass(frozen=True)
class Ranks:
    """This process among ``count`` that torchrun started; by default one alone."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """This process's place, where torchrun started it; alone where it did not."""
        if not distributed.is_torchelastic_launched():
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE
            )
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this one writes logs and checkpoints."""
        return self.rank == 0

    def device(self, device: torch.device) -> torch.device:
        """This rank's own GPU, where GPUs are used."""
        if self.count == 1 or device.type != "cuda":
            return device
        local = distributed.get_node_local_rank()
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def share(self, batch: int) -> range:
        """Which members of a batch are this rank's. Raises InputError where they cannot be dealt evenly."""
        if batch % self.count:
            raise InputError(
                f"a batch of {batch} cannot be shared evenly by {self.count} processes",
                f"Set batch in plan.json to a multiple of {self.count}, or start fewer",
            )
        return range(self.rank, batch, self.count)

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network, its gradients averaged over all ranks."""
        return network if self.count == 1 else nn.parallel.DistributedDataParallel(network)

    def mean(self, values: Tensor) -> Tensor:
        """Over all ranks."""
        if self.count > 1:
            distributed.all_reduce(values)
            values /= self.count
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on some rank."""
        if self.count == 1:
            return flag
        found = torch.tensor(float(flag))
        distributed.all_reduce(found)
        return bool(found > 0)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()


ALONE = Ranks()

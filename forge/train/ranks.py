"""Several processes that train as one: how many, on which GPUs, and how they find each other.

What each is told is what `accelerate launch` and `torchrun` would put into its environment, so that
accelerate inside the trainer finds its part; forge starts the processes itself, since a launcher's own agent
would hide which of them failed, and why. The upper half runs in forge itself, the lower in the workers.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge import process
from forge.errors import ForgeError, MissingToolError
from forge.model.estimate import usable_cores
from forge.recipe.schema import Train
from forge.train.memory import Device, named_gpus

# transformers asks these while it loads a model: the first process reads the weights, the others take theirs.
_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


@dataclass(frozen=True)
class Ranks:
    """The processes that train as one: on each of `nodes` machines one for each of `gpus`, or `processes`
    on a CPU. `address` and `port` are where the first of all listens.
    """

    nodes: int
    processes: int
    gpus: tuple[int, ...]
    address: str
    port: int
    strategy: str = "ddp"

    @property
    def count(self) -> int:
        return self.nodes * self.processes

    def environments(self, node: int = 0) -> tuple[Mapping[str, str], ...]:
        """The environment of each process on a machine; what the user has set of it stays."""
        visible = only_these(self.gpus) if self.gpus else {}
        if self.count == 1:
            return (visible,)
        threads = {"OMP_NUM_THREADS": str(max(usable_cores() // self.processes, 1))}
        alone = {"GLOO_SOCKET_IFNAME": "lo"} if self.nodes == 1 and Path("/sys/class/net/lo").exists() else {}
        shared = _FSDP if self.strategy == "fsdp" else {}
        defaults = {name: value for name, value in (threads | alone).items() if name not in os.environ}
        return tuple(
            {
                **defaults,
                **visible,
                **shared,
                "MASTER_ADDR": self.address,
                "MASTER_PORT": str(self.port),
                "WORLD_SIZE": str(self.count),
                "LOCAL_WORLD_SIZE": str(self.processes),
                "RANK": str(node * self.processes + local),
                "LOCAL_RANK": str(local),
            }
            for local in range(self.processes)
        )


def only_these(gpus: Sequence[int]) -> Mapping[str, str]:
    """The environment in which a process sees these GPUs and no others, by the numbers of nvidia-smi."""
    return {
        "CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),
        "CUDA_VISIBLE_DEVICES": ",".join(map(visible_gpu, gpus)),
    }


def only(there: int) -> str:
    """Which GPUs there are, after what there is not."""
    return "" if not there else ", only GPU 0" if there == 1 else f", only GPUs 0 to {there - 1}"


def gpus_of(train: Train, device: Device) -> tuple[int, ...]:
    """The numbers of the GPUs that train here, none on a CPU; raises `MissingToolError` for absent ones."""
    there = gpu_count() if device.kind == "cuda" else 0
    if isinstance(train.devices, tuple):
        gpus = train.devices
    else:
        gpus = tuple(range(there if train.devices == "auto" else train.devices)) if there else ()
    absent = [number for number in gpus if number >= there]
    if absent:
        raise MissingToolError(
            f"train.devices: there is no GPU {', '.join(map(str, absent))} here{only(there)}",
            hint="name fewer, or auto for all there are",
        )
    if train.strategy != "ddp" and train.nodes * len(gpus) == 1:
        raise MissingToolError(
            f"train.strategy: {train.strategy} shares a model among devices, and there is one GPU here",
            hint="use ddp, or train where there are several",
        )
    return gpus


def processes_each(train: Train, device: Device) -> int:
    """How many processes train on each machine, were the GPUs there that the recipe names."""
    return train.devices_each or max(gpu_count() if device.kind == "cuda" else 0, 1)


def ranks_of(train: Train, device: Device) -> Ranks:
    """The processes that the recipe asks for; raises what `gpus_of` raises."""
    gpus, processes = gpus_of(train, device), processes_each(train, device)
    if train.nodes * processes == 1:
        return Ranks(1, 1, gpus, "", 0)
    own = train.nodes == 1
    address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if own else socket.gethostname())
    port = os.environ.get("MASTER_PORT", "")
    number = int(port) if port.isdecimal() else _free_port(is_local=own)
    return Ranks(train.nodes, processes, gpus, address, number, train.strategy)


def gpu_count() -> int:
    """How many NVIDIA GPUs a process here may use."""
    named = named_gpus()
    if named is not None:
        return len(named)
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        lines = process.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]).output.splitlines()
    except (ForgeError, OSError):
        return 0
    return sum(line.strip().isdecimal() for line in lines)


def visible_gpu(number: int) -> str:
    """What CUDA calls the GPU of that number among those that may be used."""
    named = named_gpus()
    return named[number] if named else str(number)


def _free_port(*, is_local: bool) -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1" if is_local else "", 0))
        return int(listener.getsockname()[1])


def rank() -> int:
    """Which of the processes this one is."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Which GPU of this machine is this process's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def agreed(device: Any, *wishes: bool) -> tuple[bool, ...]:
    """Of each wish whether any of the processes has it; all ask at the same moment."""
    if rank_count() == 1:
        return wishes
    import torch

    votes = torch.tensor([float(wish) for wish in wishes], device=device)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes.tolist())


def wait_for_all() -> None:
    """Go on when every process is here."""
    if rank_count() > 1:
        import torch

        torch.distributed.barrier()

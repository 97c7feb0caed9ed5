"""The processes of a run: how many there are, which one this is, and how they agree.

`torchrun --nproc-per-node=2 train.py ...` and `srun python train.py ...` start the same program
several times. Each process learns its place from the environment: RANK, WORLD_SIZE and LOCAL_RANK
of torchrun, or SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID of srun. (SLURM_NTASKS is of no
use: it is set in a batch script too, where the program runs once.) Without them it is alone.

Process 0 is the one that writes: the run folder, the tracker, what is shown. What it finds there,
the others are told (`agreed`). What each finds out for itself, such as whether its device is there,
ends all of them if it ends one (`together`). So a mistake is one message, and no process waits for
another that has left.

Two groups of processes talk: gloo between hosts, NCCL between CUDA devices. What the loop asks the
others (was there a signal, what is the mean loss) is a few bytes between hosts, so that no device
waits for it.

A process that dies takes the others along: gloo's connections break, and NCCL's are ended by
torchrun or srun. The error is told from a fault of the program by `lost_another`.
"""

from __future__ import annotations

import atexit
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")

PORTS = range(20_000, 50_000)
"""Where the processes of a SLURM job meet, by the number of the job."""
_LOST = re.compile(
    r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|Timed out|failed to recv|"
    r"Socket Timeout|Connection was likely closed|NCCL"
)


class LostProcessError(RuntimeError):
    """Another process of the run has ended before its time."""


@dataclass(frozen=True)
class World:
    """size: processes of the run. rank: this one's number. local_rank: its number on this host."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0


ALONE = World()


def here(environment: Mapping[str, str] | None = None) -> World:
    """This process's place, as the environment says.

    Raises ValueError naming the variable if it is not a whole number in range.
    """
    given = os.environ if environment is None else environment
    for size, rank, local in (
        ("WORLD_SIZE", "RANK", "LOCAL_RANK"),
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ):
        if size in given and rank in given:
            count = _number(given, size, least=1)
            return World(
                count,
                _number(given, rank, below=count),
                _number(given, local, below=count) if local in given else 0,
            )
    return ALONE


def _number(
    environment: Mapping[str, str], name: str, *, least: int = 0, below: int | None = None
) -> int:
    text = environment[name]
    if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
        limit = "" if below is None else f" and less than {below}"
        raise ValueError(f"{name}={text!r}: must be a whole number, at least {least}{limit}")
    return int(text)


def connect(world: World, *, cuda: bool) -> None:
    """Meet the other processes, once in this process; it parts from them when it ends.

    cuda: whether this process computes on a CUDA device: on that with its number on the host, or
    on the only one that it is shown, as by srun --gpus-per-task. Raises ValueError if nobody says
    where they meet, and if there are fewer devices than processes.
    """
    if dist.is_initialized():
        return
    if cuda:
        torch.cuda.set_device(_device(world, torch.cuda.device_count()))
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(_meeting_point(os.environ))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, rank=world.rank, world_size=world.size)
    atexit.register(part)


def _device(world: World, devices: int) -> int:
    """The CUDA device of this process, of those that it is shown."""
    if devices == 1 and "SLURM_PROCID" in os.environ:
        return 0
    if world.local_rank >= devices:
        raise ValueError(
            f"parallel: process {world.rank} is number {world.local_rank} on its host, which has "
            f"{devices} CUDA devices; start one process for each device"
        )
    return world.local_rank


def part() -> None:
    """Leave the other processes, if they were met."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _meeting_point(environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT of a SLURM job: its first host, a port by its number."""
    hosts = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST"))
    job = environment.get("SLURM_JOB_ID")
    if hosts is None or job is None:
        raise ValueError(
            "parallel: nothing says where the processes meet; start them with torchrun or srun, or "
            "set MASTER_ADDR and MASTER_PORT"
        )
    first = hosts
    if "[" in hosts or "," in hosts:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True
        )
        first = listed.stdout.split()[0]
    return {"MASTER_ADDR": first, "MASTER_PORT": str(PORTS[int(job) % len(PORTS)])}


def connected() -> bool:
    """Whether this process has met others."""
    return dist.is_initialized()


def agreed(find: Callable[[], T]) -> T:
    """What process 0 finds, in all processes; `find` runs there alone. What it raises is raised in
    all.
    """
    if not connected():
        return find()
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = find()
        except Exception as error:  # of whatever kind: the others wait for it
            found[1] = error
            dist.broadcast_object_list(found, src=0, device=_HOST)
            raise
    dist.broadcast_object_list(found, src=0, device=_HOST)
    if found[1] is not None:
        raise found[1]
    result: T = found[0]
    return result


def by_first(find: Callable[[], T], others: T) -> T:
    """What process 0 finds there, and `others` elsewhere. What it raises is raised in all."""
    kept = [others]

    def run() -> None:
        kept[0] = find()

    agreed(run)
    return kept[0]


def together(find: Callable[[], T]) -> T:
    """What this process finds. If `find` raises ValueError in one process, all raise it."""
    found: list[T] = []
    said: str | None = None
    try:
        found.append(find())
    except ValueError as error:
        said = str(error)
    for rank, words in enumerate(each(said)):
        if words is not None:
            raise ValueError(words if rank == 0 else f"{words} (process {rank})")
    return found[0]


_HOST = torch.device("cpu")


def largest(value: int) -> int:
    """The largest `value` of all processes."""
    if not connected():
        return int(value)
    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def mean(values: Tensor) -> Tensor:
    """The mean of `values` over all processes, in float64 on the host: sums of few numbers that are
    the same in any order of the processes.
    """
    total = values.detach().to("cpu", torch.float64)
    if not connected():
        return total
    every = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(every, total)
    return torch.stack(every).mean(0)


def each(value: T) -> list[T]:
    """The `value` of every process, in order."""
    if not connected():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all processes, on the host."""
    total = values.detach().cpu()
    if connected():
        dist.all_reduce(total)
    return total


def broadcast(tensors: list[Tensor]) -> None:
    """Put process 0's values into `tensors`, which have the same shapes in all processes."""
    if connected():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def spread(value: object) -> bool:
    """Whether `value` is a tensor of which each process holds a part."""
    if not connected():
        return False
    from torch.distributed.tensor import DTensor  # a second of imports, which a lone process saves

    return isinstance(value, DTensor)


def sharded_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` whose parameters fsdp makes whole while they run."""
    if not connected():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def whole(value: Tensor) -> Tensor:
    """A tensor that may be spread over processes, as each of them would have it alone. All have to
    ask.
    """
    return cast("DTensor", value).full_tensor() if spread(value) else value


def local(value: Tensor) -> Tensor:
    """What this process holds of a tensor that may be spread over several."""
    return cast("DTensor", value).to_local() if spread(value) else value


def lost_another(error: BaseException) -> bool:
    """Whether `error` says that another process has gone, of several."""
    return (
        connected()
        and dist.get_world_size() > 1
        and isinstance(error, RuntimeError)
        and (isinstance(error, dist.DistError) or _LOST.search(str(error)) is not None)
    )

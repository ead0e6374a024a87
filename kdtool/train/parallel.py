"""Several processes on one run: gradients summed, one writer, nothing assumed about the launcher.

A process knows its place from RANK, WORLD_SIZE and LOCAL_RANK, which torchrun, Slurm wrappers, Ray
and accelerate all set. Each optimiser step takes `batch_size * world` rows; every process takes
every world-th of them, so losses and weights equal those of one process with that batch size.
"""

import copy
import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from kdtool.errors import TrainingProblem
from kdtool.run import Run

_PATIENCE = datetime.timedelta(hours=12)
"""How long processes wait for each other: the first may fine-tune a teacher or write a report alone."""

_BUCKET = 25 * 2**20


def join(run: Run) -> None:
    """Take this process's place among its peers; does nothing when it is alone."""
    run.rank, run.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if run.world <= 1:
        return
    if run.device == "cuda":
        run.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(run.device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if run.device.startswith("cuda") else "gloo", timeout=_PATIENCE)


def leave(run: Run) -> None:
    """Say goodbye to the peers."""
    if run.world > 1 and dist.is_initialized():
        dist.destroy_process_group()


def wait(run: Run) -> None:
    """Wait until every process is here."""
    if run.world > 1:
        with peers():
            dist.barrier()


@contextmanager
def first_alone(run: Run) -> Iterator[None]:
    """Let the first process do something before all others do it."""
    if run.rank != 0:
        wait(run)
    yield
    if run.rank == 0:
        wait(run)


@contextmanager
def peers() -> Iterator[None]:
    """Say in one line that a peer is gone, instead of what the transport says of it."""
    try:
        yield
    except RuntimeError as error:
        lost = ("connection", "gloo", "nccl", "socket", "peer", "broken pipe")
        if any(word in str(error).lower() for word in lost):
            raise TrainingProblem(
                "another process of this job is gone", hint="the same command goes on from the last checkpoint"
            ) from None
        raise


def sum_over(run: Run, values: Tensor) -> Tensor:
    """Sum a small tensor over all processes, in place."""
    if run.world > 1:
        with peers():
            dist.all_reduce(values)
    return values


def gather_objects(run: Run, value: Any) -> list[Any]:
    """What each process holds, in order of rank."""
    if run.world == 1:
        return [value]
    found: list[Any] = [None] * run.world
    with peers():
        dist.all_gather_object(found, value)
    return found


def gather_units(own: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes, for a loss that couples them; itself where there is one process.

    All processes must ask together. This process's rows carry their gradient; those of others are
    constants. Where every process computes the whole loss, the gradients therefore add up to that
    of the whole.

    Args:
        own: [n, ...]; n may differ between processes.

    Returns:
        [sum of n, ...] in order of rank, and where the own rows begin.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return own, 0
    world, rank = dist.get_world_size(), dist.get_rank()
    with peers():
        sizes = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(world)]
        dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
        counts = torch.cat(sizes).tolist()
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own.detach()
        found = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(found, padded)
    parts = [rows[:count] for rows, count in zip(found, counts, strict=True)]
    parts[rank] = own
    return torch.cat(parts), sum(counts[:rank])


def places(count: int, device: torch.device) -> Tensor:
    """Where this process's rows stand in the whole batch, [count]: processes take turns, as the loop deals them out."""
    several = dist.is_available() and dist.is_initialized()
    world, rank = (dist.get_world_size(), dist.get_rank()) if several else (1, 0)
    return torch.arange(count, device=device) * world + rank


def sum_gradients(run: Run, parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of unsharded parameters over all processes, bucket by bucket.

    A parameter without gradient in every process keeps none, so that optimisers skip it as they
    would in a single process.
    """
    plain = [p for p in parameters if not isinstance(p, DTensor)]
    for p in parameters:
        if isinstance(p, DTensor) and p.grad is not None:
            p.grad.mul_(run.world)  # sharded gradients arrive as means over processes
    used = sum_over(run, torch.tensor([float(p.grad is not None) for p in plain], device=run.device))
    chosen = [p for p, count in zip(plain, used.tolist(), strict=True) if count]
    for p in chosen:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket: list[Tensor] = []
    size = 0
    for p in chosen:
        assert p.grad is not None
        bucket.append(p.grad)
        size += p.grad.numel() * p.grad.element_size()
        if size >= _BUCKET:
            _sum_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    with peers():
        dist.all_reduce(flat)
    for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def shard(model: nn.Module, run: Run) -> None:
    """Shard a model's parameters over all processes (FSDP2), layer by layer where it has layers."""
    mesh = init_device_mesh(run.device.split(":")[0], (run.world,))
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    for layer in stacks[0] if stacks else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Sharded and plain tensors apart: operations on lists do not mix them."""
    kinds: dict[bool, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(isinstance(tensor, DTensor), []).append(tensor)
    return list(kinds.values())


def total_norm(grads: Sequence[Tensor]) -> Tensor:
    """Norm of all gradients together, over all shards."""
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in by_kind(grads)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; all processes must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a full tensor into a tensor that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
        target.copy_(value)


def gathered(model: Any) -> Any:
    """An unsharded copy of a sharded model; the model itself when it is not sharded."""
    state = {name: whole(value) for name, value in model.state_dict().items()}
    if not any(isinstance(p, DTensor) for p in model.parameters()):
        return model
    plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(state)
    return plain.eval()

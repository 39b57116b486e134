"""The few collectives that training needs; with one process every one of them is the identity.

Ranks hold shares of one global batch, possibly of unequal size. Nothing is wrapped: the trainer averages gradients
explicitly (`sum_gradients`), and layers whose statistics span the batch call the differentiable `all_reduce` or
`gather_rows`, so that W ranks of B/W examples compute what one rank of B does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped

BUCKET_BYTES = 25 * 2**20


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(total: int, rank_: int | None = None, world: int | None = None) -> slice:
    """The slice of `total` consecutive examples that a rank holds; sizes differ by at most one."""
    r = rank() if rank_ is None else rank_
    w = world_size() if world is None else world
    return slice(total * r // w, total * (r + 1) // w)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # every rank's loss depends on every rank's input
        return _AllReduce.apply(grad)  # itself, so that it can be differentiated again


def all_reduce(x: Float[Tensor, " *shape"]) -> Float[Tensor, " *shape"]:
    """Sum over ranks, differentiable (also twice)."""
    if world_size() == 1:
        return x
    return _AllReduce.apply(x)  # type: ignore[no-any-return]


def gather_rows(x: Shaped[Tensor, " b *shape"]) -> Shaped[Tensor, " B *shape"]:
    """All ranks' rows in rank order, differentiable. Row counts may differ between ranks."""
    if world_size() == 1:
        return x
    sizes = row_counts(x.shape[0], x.device)
    start = sum(sizes[: rank()])
    whole = x.new_zeros((sum(sizes), *x.shape[1:]))
    return all_reduce(torch.cat([whole[:start], x, whole[start + x.shape[0] :]]))


def row_counts(rows: int, device: torch.device) -> list[int]:
    """How many rows each rank holds."""
    if world_size() == 1:
        return [rows]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=device)
    counts[rank()] = rows
    dist.all_reduce(counts)
    return [int(c) for c in counts.tolist()]


def sum_(*tensors: Tensor) -> None:
    """Sum over ranks in place, outside autograd."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast(x: Tensor) -> Tensor:
    """Rank 0's tensor on every rank.

    Every rank draws before it broadcasts, so that the ranks' random streams advance alike.
    """
    if world_size() > 1:
        x = x.contiguous()
        dist.broadcast(x, 0)
    return x


def choose_rows(x: Shaped[Tensor, " b *shape"], count: int) -> Shaped[Tensor, " count *shape"]:
    """`count` random rows of the global batch, the same on every rank; repeated where the batch has too few."""
    rows = gather_rows(x)
    order = torch.randperm(rows.shape[0], device=x.device)
    return rows[broadcast(order.repeat(-(-count // rows.shape[0]))[:count])]


def any_true(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value)
    return bool(value.item() > 0)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum gradients over ranks in flat buckets of one dtype. A gradient that is None is None on every rank: a turn's
    gradient pattern never depends on the data."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    for bucket in _buckets(grads):
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        for g, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            g.copy_(part.view_as(g))


def _buckets(grads: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    held = 0
    for g in grads:
        if bucket and (held + g.nbytes > BUCKET_BYTES or g.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(g)
        held += g.nbytes
    if bucket:
        yield bucket


def gather_objects(value: Any) -> list[Any]:
    """One Python object of every rank, in rank order, on every rank (control flow only; goes through pickle)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values

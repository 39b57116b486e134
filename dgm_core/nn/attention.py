"""Multi-head attention of each position to those strictly before it, over a whole grid or one column at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.nn.causal import Pointwise

if TYPE_CHECKING:
    from jaxtyping import Float


class AttentionMemory(NamedTuple):
    """Keys and values of the positions so far."""

    keys: Float[Tensor, " n heads positions d"]
    values: Float[Tensor, " n heads positions d"]


class CausalAttention(nn.Module):
    """softmax(q_i · k_j / √d) over j < i in raster order; the first position, which has none before it, receives zeros.

    The sequence is the grid's raster order. Dropout falls on the attention weights while training. Strictness is had by
    dropping the first query and the last key, after which the ordinary causal mask applies.
    """

    def __init__(self, queries: int, memories: int, outputs: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = Pointwise(queries, outputs)
        self.key = Pointwise(memories, outputs)
        self.value = Pointwise(memories, outputs)

    def forward(
        self, query: Float[Tensor, " B q H W"], memory: Float[Tensor, " B m H W"]
    ) -> Float[Tensor, " B out H W"]:
        q, k, v = (self._split(t.flatten(2)) for t in (self.query(query), self.key(memory), self.value(memory)))
        dropout = self.dropout if self.training else 0.0
        if q.shape[2] > 1:
            seen = F.scaled_dot_product_attention(
                q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], dropout_p=dropout, is_causal=True
            )
        else:
            seen = v[:, :, 1:]
        return F.pad(seen, (0, 0, 1, 0)).transpose(2, 3).reshape(q.shape[0], -1, *query.shape[2:])

    def start(self, n: int, positions: int) -> AttentionMemory:
        shape = (n, self.heads, positions, self.key.weight.shape[0] // self.heads)
        return AttentionMemory(self.key.weight.new_zeros(shape), self.key.weight.new_zeros(shape))

    def remember(self, memory: Float[Tensor, " n m"], past: AttentionMemory, position: int) -> None:
        """Store the key and the value of a position that is now known in full."""
        past.keys[:, :, position] = self.key(memory).unflatten(1, (self.heads, -1))
        past.values[:, :, position] = self.value(memory).unflatten(1, (self.heads, -1))

    def step(self, query: Float[Tensor, " n q"], past: AttentionMemory, position: int) -> Float[Tensor, " n out"]:
        """What `position` receives from the positions remembered before it."""
        if position == 0:
            return past.values.new_zeros(query.shape[0], self.value.weight.shape[0])
        q = self.query(query).unflatten(1, (self.heads, 1, -1)).to(past.keys.dtype)
        return F.scaled_dot_product_attention(q, past.keys[:, :, :position], past.values[:, :, :position]).flatten(1)

    def _split(self, x: Float[Tensor, " B out N"]) -> Float[Tensor, " B heads N d"]:
        return x.unflatten(1, (self.heads, -1)).transpose(2, 3)

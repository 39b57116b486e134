"""Vector quantisation: a codebook, the nearest code, a gradient through it, and a codebook that stays in use.

A. van den Oord, O. Vinyals, K. Kavukcuoglu, 2017 (arXiv:1711.00937): eqs. 1–3 and appendix A.1. The rotation estimator:
C. Fifty et al., 2024 (arXiv:2410.06424). Revival of dead codes: P. Dhariwal et al., 2020 (arXiv:2005.00341).

With n_i rows of a batch assigned to code i, and m_i their sum, both as shares of the batch's rows,

    N_i ← γ N_i + (1 − γ) n_i,   M_i ← γ M_i + (1 − γ) m_i,   e_i ← M_i / N_i        (A.1, eqs. 6–8),

which is A.1 with both sides divided by the number of rows: N_i is then code i's share of recent use, whatever the
batch size, and no smoothing is needed because a code that is out of use keeps its place.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgm_core import distributed
from dgm_core.precision import full_precision, promote

if TYPE_CHECKING:
    from jaxtyping import Float, Int

CHUNK = 2**22  # distances held at once: 16 MiB in float32
CANDIDATES = 16  # rows an example offers for the revival of codes
Estimator = Literal["straight_through", "rotation"]


class Quantised(NamedTuple):
    """What a quantiser makes of a grid of features."""

    value: Float[Tensor, " B D *grid"]  # the codes' vectors; its gradient reaches the features
    codes: Int[Tensor, " B *grid"]
    commitment: Float[Tensor, ""]  # mean of (z − sg[e])² over rows and features
    codebook: Float[Tensor, ""]  # mean of (sg[z] − e)²: the codebook's own loss


class VectorQuantiser(nn.Module):
    """Replaces each feature vector by its nearest code.

    Args:
        codes: K.
        features: D.
        learn: the codebook is moved by moving averages ("ema", A.1: it is a buffer) or by its loss ("loss", eq. 3: it
            is a parameter).
        decay: γ, of the moving averages of use (and of the codebook with "ema").
        estimator: how the gradient passes the quantiser.
        revive_below: a code whose use falls below this multiple of 1/K is put on a random feature vector; 0: never.
    """

    codebook: Tensor
    usage: Tensor
    code_sum: Tensor
    perplexity: Tensor
    used: Tensor
    batch_count: Tensor
    batch_sum: Tensor

    def __init__(
        self,
        codes: int,
        features: int,
        *,
        learn: Literal["ema", "loss"] = "ema",
        decay: float = 0.99,
        estimator: Estimator = "straight_through",
        revive_below: float = 0.0,
    ) -> None:
        super().__init__()
        self.learn, self.decay, self.estimator, self.revive_below = learn, decay, estimator, revive_below
        start = torch.empty(codes, features).uniform_(-1 / codes, 1 / codes)
        if learn == "ema":
            self.register_buffer("codebook", start)
            self.register_buffer("code_sum", start / codes)
            self.register_buffer("batch_sum", torch.zeros(codes, features), persistent=False)
        else:
            self.codebook = nn.Parameter(start)
        self.register_buffer("usage", torch.full((codes,), 1 / codes))
        self.register_buffer("perplexity", torch.tensor(float(codes)))
        self.register_buffer("used", torch.ones(()))
        self.register_buffer("batch_count", torch.zeros(codes), persistent=False)
        self._candidates: list[Tensor] = []

    def forward(self, z: Float[Tensor, " B D *grid"], observe: bool = False) -> Quantised:
        """Quantise; with `observe`, add the batch to the statistics that `settle` moves the codebook by."""
        with full_precision(z.device):
            z = promote(z)
            rows = z.movedim(1, -1)
            flat = rows.reshape(-1, rows.shape[-1])
            codes = nearest(flat.detach(), self.codebook.detach())
            e = F.embedding(codes, self.codebook)
            if observe:
                self._observe(rows.detach(), codes)
            value = _ESTIMATORS[self.estimator](flat, e.detach())
            return Quantised(
                value.view_as(rows).movedim(-1, 1),
                codes.view(rows.shape[:-1]),
                F.mse_loss(flat, e.detach()),
                F.mse_loss(e, flat.detach()),
            )

    def look_up(self, codes: Int[Tensor, " B *grid"]) -> Float[Tensor, " B D *grid"]:
        """The vectors of these codes."""
        return F.embedding(codes.long(), self.codebook).movedim(-1, 1)

    def _observe(self, rows: Float[Tensor, " B *grid D"], codes: Int[Tensor, " N"]) -> None:
        flat = rows.reshape(-1, rows.shape[-1]).to(self.usage)
        self.batch_count.index_add_(0, codes, torch.ones_like(flat[:, 0]))
        if self.learn == "ema":
            self.batch_sum.index_add_(0, codes, flat)
        if self.revive_below:
            self._candidates.append(pick_rows(rows, CANDIDATES).to(self.usage))

    @torch.no_grad()
    def settle(self) -> None:
        """Move the codebook and the record of its use by what was observed since the last call, over all ranks.

        Nothing is read from the device: which codes are revived is decided there.
        """
        distributed.sum_(self.batch_count)
        total = self.batch_count.sum()
        seen = (total > 0).to(self.usage)  # a play that observed nothing moves nothing
        rate = (1 - self.decay) * seen
        share = self.batch_count / total.clamp_min(1)
        self.usage.lerp_(share, rate)
        if self.learn == "ema":
            distributed.sum_(self.batch_sum)
            self.code_sum.lerp_(self.batch_sum / total.clamp_min(1), rate)
            size = self.usage[:, None]
            tiny = torch.finfo(size.dtype).tiny ** 0.5
            moved = (size > tiny) & (total > 0)
            self.codebook.copy_(torch.where(moved, self.code_sum / size.clamp_min(tiny), self.codebook))
            self.batch_sum.zero_()
        self.perplexity.lerp_(torch.exp(torch.special.entr(share).sum()), seen)
        self.used.lerp_((share > 0).to(share).mean(), seen)
        if self._candidates:
            self._revive(torch.cat(self._candidates))
            self._candidates = []
        self.batch_count.zero_()

    def _revive(self, candidates: Float[Tensor, " n D"]) -> None:
        """Put every dead code on a row of the batch, the same on every rank, as if it had been used its fair share."""
        K = self.usage.shape[0]
        rows = distributed.choose_rows(candidates, K)
        dead = self.usage < self.revive_below / K
        self.usage.masked_fill_(dead, 1 / K)
        self.codebook.data.copy_(torch.where(dead[:, None], rows, self.codebook))
        if self.learn == "ema":
            self.code_sum.copy_(torch.where(dead[:, None], rows / K, self.code_sum))

    @torch.no_grad()
    def start_from(self, rows: Float[Tensor, " n D"], iterations: int = 10) -> None:
        """Put the codes on the k-means centres of `rows`, which are the same on every rank."""
        centres, counts = kmeans(rows.to(self.usage), self.usage.shape[0], iterations)
        share = counts / counts.sum()
        self.codebook.data.copy_(centres)
        self.usage.copy_(share)
        if self.learn == "ema":
            self.code_sum.copy_(centres * share[:, None])
        self.perplexity.copy_(torch.exp(torch.special.entr(share).sum()))
        self.used.copy_((share > 0).to(share).mean())


@torch.no_grad()
def nearest(rows: Float[Tensor, " N D"], codebook: Float[Tensor, " K D"]) -> Int[Tensor, " N"]:
    """Index of the code at the least Euclidean distance (eq. 1), without holding all N × K distances."""
    N, K = rows.shape[0], codebook.shape[0]
    squares = codebook.square().sum(1)
    size = max(1, CHUNK // K)
    # One buffer for all parts: what is allocated anew for each can leave holes that no later one fits into.
    distances = rows.new_empty(min(size, N), K)
    codes = torch.empty(N, dtype=torch.int64, device=rows.device)
    for part, found in zip(rows.split(size), codes.split(size), strict=True):
        held = distances[: part.shape[0]]
        torch.addmm(squares, part, codebook.T, alpha=-2, out=held)  # the row's own square does not matter
        torch.argmin(held, 1, out=found)
    return codes


def straight_through(z: Float[Tensor, " N D"], e: Float[Tensor, " N D"]) -> Float[Tensor, " N D"]:
    """e, with the gradient of the identity."""
    return z + (e - z).detach()


def rotation(z: Float[Tensor, " N D"], e: Float[Tensor, " N D"]) -> Float[Tensor, " N D"]:
    """e as |e|/|z| R z with the rotation R of z onto e held fixed (Fifty et al. 2024, section 4.2).

    R = I − 2 r rᵀ + 2 ê ẑᵀ with ẑ = z/|z|, ê = e/|e|, r = (ẑ + ê)/|ẑ + ê|. The gradient is turned by Rᵀ, so that its
    angle to z is what the decoder's gradient has to e.
    """
    fixed = z.detach()
    norm_z = fixed.norm(dim=1, keepdim=True).clamp_min(1e-6)
    norm_e = e.norm(dim=1, keepdim=True).clamp_min(1e-6)
    z_hat, e_hat = fixed / norm_z, e / norm_e
    r = F.normalize(z_hat + e_hat, dim=1)
    turned = z - 2 * (z * r).sum(1, keepdim=True) * r + 2 * (z * z_hat).sum(1, keepdim=True) * e_hat
    return norm_e / norm_z * turned


_ESTIMATORS = {"straight_through": straight_through, "rotation": rotation}


def pick_rows(rows: Float[Tensor, " B *grid D"], count: int) -> Float[Tensor, " n D"]:
    """Up to `count` random rows of each example's grid."""
    flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:-1]), rows.shape[-1])
    if flat.shape[1] <= count:
        return flat.flatten(0, 1)
    chosen = torch.rand(flat.shape[:2], device=flat.device).topk(count, dim=1).indices
    return flat.gather(1, chosen[..., None].expand(-1, -1, flat.shape[2])).flatten(0, 1)


def kmeans(rows: Float[Tensor, " n D"], K: int, iterations: int) -> tuple[Float[Tensor, " K D"], Float[Tensor, " K"]]:
    """Centres and counts by Lloyd's algorithm from a k-means++ start; a centre that loses all its rows stays.

    `rows` are the same on every rank and so are the draws; hence the result.
    """
    u = distributed.broadcast(torch.rand(K, dtype=rows.dtype, device=rows.device))
    centres = rows.new_empty(K, rows.shape[1])
    distance = rows.new_ones(rows.shape[0])  # the first centre is drawn uniformly
    for k in range(K):
        mass = (distance + torch.finfo(rows.dtype).tiny).cumsum(0)  # rows that all coincide are drawn uniformly
        row = torch.searchsorted(mass, u[k] * mass[-1], right=True).clamp_max(rows.shape[0] - 1)
        centres[k] = rows[row]
        from_here = (rows - centres[k]).square().sum(1)
        distance = from_here if k == 0 else torch.minimum(distance, from_here)
    counts = rows.new_zeros(K)
    for _ in range(iterations):
        codes = nearest(rows, centres)
        counts = rows.new_zeros(K).index_add_(0, codes, rows.new_ones(rows.shape[0]))
        sums = torch.zeros_like(centres).index_add_(0, codes, rows)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centres)
    return centres, counts

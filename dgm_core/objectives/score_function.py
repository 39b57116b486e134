"""Score-function estimators for layers of discrete units: learning signals and surrogates.

With q(h | x) = Π_l q(h^l | h^{l−1}) and p(x, h) = Π_l p(h^l | h^{l+1}) the bound's gradient in q's parameters is

    ∂/∂φ E_q[log p(x, h) − log q(h | x)] = E_q[Σ_i l_i ∂/∂φ log q(h^i | h^{i−1})],

in which l_i may be all of log p − log q or, without bias, only the terms that h^i has a part in. `log_p` holds
log p(h^l | h^{l+1}) of layers 0 … L on its last axis, `log_q` log q(h^l | h^{l−1}) of layers 1 … L.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def learning_signals(
    log_p: Float[Tensor, " *B layers_and_one"], log_q: Float[Tensor, " *B layers"]
) -> Float[Tensor, " *B layers"]:
    """l_i = Σ_{j ≥ i − 1} log p(h^j | h^{j+1}) − Σ_{j ≥ i} log q(h^j | h^{j−1}); the first is all of it.

    A. Mnih, K. Gregor, 2014. arXiv:1402.0030, "Local learning signals".
    """
    above = (log_p[..., 1:] - log_q).flip(-1).cumsum(-1).flip(-1)
    return log_p[..., :-1] + above


def score_function(
    log_p: Float[Tensor, " *B layers_and_one"],
    log_q: Float[Tensor, " *B layers"],
    signals: Float[Tensor, " *B signals"],
) -> Float[Tensor, " *B"]:
    """Σ log p + Σ_i l_i log q_i, the signals held fixed: both nets' update is its gradient. One signal serves all
    layers."""
    return log_p.sum(-1) + (signals.detach() * log_q).sum(-1)


def with_value(value: Float[Tensor, ""], ascent: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """`ascent`'s gradient under another value: a surrogate's own value means nothing."""
    return value.detach() + (ascent - ascent.detach())

"""Where a model puts examples in its latent space: posterior means on the plane, coloured by class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgm_core.capabilities import HasPosterior
from dgm_core.evaluation.drawing import Panel, coloured_points
from dgm_core.evaluation.latents import posterior_means

if TYPE_CHECKING:
    from jaxtyping import Float

    from dgm_core.evaluation.work import Work

POINTS = 2000


def step(work: Work) -> None:
    if not isinstance(work.model, HasPosterior):
        return
    rows = torch.randperm(len(work.test.x))[:POINTS]  # so that no class lies on top of the others
    examples = work.test.rows(rows)
    means, how = posterior_means(work.model, examples, work.options.batch_size)
    if means.ndim != 2 or means.shape[1] < 2:
        return
    labels = examples.y if work.spec.classes > 1 else None
    names = work.info.get("class_names") or [str(c) for c in range(work.spec.classes)]
    drawn = coloured_points(panels(means.double(), work.kl), labels, names)
    of = "means" if how == "mean" else "draws"
    by = ", coloured by class" if labels is not None else ""
    units = "the two latent dimensions of greatest KL" if means.shape[1] > 2 else "both latent dimensions"
    principal = " and the first two principal components" if means.shape[1] > 2 else ""
    caption = f"Posterior {of} of {len(means)} {work.options.split} examples{by}: {units}{principal}"
    work.show("latent_map.png", (drawn, caption))


def panels(means: Float[Tensor, " n latents"], kl: Float[Tensor, " latents"] | None) -> list[Panel]:
    """The two dimensions of greatest KL; where there are more, the first two principal components as well."""
    order = torch.arange(means.shape[1]) if kl is None else kl.argsort(descending=True)
    i, j = sorted(order[:2].tolist())
    found = [Panel("latent dimensions", f"dimension {i}", f"dimension {j}", means[:, [i, j]])]
    if means.shape[1] > 2:
        centred = means - means.mean(0)
        _, values, axes = torch.linalg.svd(centred, full_matrices=False)
        shares = values.square() / values.square().sum().clamp_min(1e-30)
        axes = torch.where(axes.sum(1, keepdim=True) < 0, -axes, axes)[:2]  # which way one points is rounding's choice
        first, second = (f"component {k + 1} ({100 * shares[k]:.0f} % of the variance)" for k in range(2))
        found.append(Panel("principal components", first, second, centred @ axes.T))
    return found

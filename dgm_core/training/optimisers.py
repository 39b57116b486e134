"""From a recipe's `Optimizer` to torch's, and the learning rate as a function of the clock alone."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dgm_core.config import Optimizer, Recipe, RecipeError
from dgm_core.contract import Clock, GenerativeModel


def lr_factor(settings: Optimizer, clock: Clock) -> float:
    """What `lr` is multiplied by in the round that starts at `clock`: warm-up times schedule."""
    warm = min(1.0, (clock.step + 1) / settings.warmup) if settings.warmup else 1.0
    t, final = clock.progress, settings.final
    if settings.schedule == "linear":
        return warm * (1 + (final - 1) * t)
    if settings.schedule == "cosine":
        return warm * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * t)))
    if settings.schedule == "exponential":
        return warm * final**t
    return warm


class Player:
    """One player's parameters with their optimiser and their averaged copy."""

    def __init__(self, name: str, named: Mapping[str, nn.Parameter], settings: Optimizer) -> None:
        self.name = name
        self.settings = settings
        self.names = list(named)
        self.parameters = list(named.values())
        self.optimizer = _build(settings, named)
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema is not None else None

    def step(self, clock: Clock, gate: Tensor | None) -> None:
        """Clip, step and average. With a gate of 0 nothing moves; the decision stays on the device."""
        if self.settings.clip_value is not None:
            nn.utils.clip_grad_value_(self.parameters, self.settings.clip_value)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm)
        factor = lr_factor(self.settings, clock)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if gate is None:
            self.optimizer.step()
        else:
            self._gated_step(gate)
        if self.average is not None and self.settings.ema is not None:
            # Early on the average follows closely, so that a short run is not an average of its initialisation.
            decay = min(self.settings.ema, (1 + clock.step) / (10 + clock.step))
            get_ema_multi_avg_fn(decay)(self.average, [p.detach() for p in self.parameters], None)

    def _gated_step(self, gate: Tensor) -> None:
        before = {id(t): t.clone() for t in self._tensors()}
        self.optimizer.step()
        for t in self._tensors():
            t.copy_(torch.where(gate > 0, t, before.get(id(t), torch.zeros_like(t))))

    def _tensors(self) -> list[Tensor]:
        state = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return [*self.parameters, *state]  # the objects themselves: they are told apart by their ids

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "average": self.average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        groups = self.optimizer.param_groups
        self.optimizer.load_state_dict(state["optimizer"])
        for mine, loaded in zip(groups, self.optimizer.param_groups, strict=True):
            loaded["initial_lr"] = mine["initial_lr"]
        if self.average is not None:
            for mine, saved in zip(self.average, state["average"], strict=True):
                mine.copy_(saved)


def named_players(model: GenerativeModel, recipe: Recipe) -> dict[str, dict[str, nn.Parameter]]:
    """Each player's parameters by name, after a look at whether the recipe fits the model.

    Raises:
        RecipeError: a parameter has no owner or two, or a player has no optimiser, or the recipe names one that is not
            the model's, or a group of an optimiser matches nothing.
    """
    owned = model.players()
    names = {id(p): name for name, p in model.named_parameters()}
    owners = [id(p) for parameters in owned.values() for p in parameters]
    if sorted(owners) != sorted(names):
        stray = [name for key, name in names.items() if owners.count(key) != 1]
        raise RecipeError(f"every parameter has one owner among players {list(owned)}; not so: {', '.join(stray)}")
    movers = {player for turn in model.turns() for player in turn.players}
    missing, extra = movers - set(recipe.optimizers), set(recipe.optimizers) - set(owned)
    if missing or extra:
        raise RecipeError(
            f"recipe.optimizers has {sorted(recipe.optimizers)}; this model's players are {sorted(movers)}: "
            f"give each of them one optimiser"
        )
    named = {
        player: {names[id(p)]: p for p in owned[player]}
        for player in recipe.optimizers
        if owned[player]  # a configuration may leave a player without parameters
    }
    for player, parameters in named.items():
        _groups(recipe.optimizers[player], parameters)
    return named


def build_players(model: GenerativeModel, recipe: Recipe) -> dict[str, Player]:
    """One `Player` for each of the model's, with the recipe's optimiser. Raises what `named_players` does."""
    named = named_players(model, recipe)
    return {player: Player(player, parameters, recipe.optimizers[player]) for player, parameters in named.items()}


def _build(settings: Optimizer, named: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    groups = _groups(settings, named)
    s = settings
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in named.values())
    if s.algorithm == "adam":
        return torch.optim.Adam(groups, betas=s.betas, eps=s.eps, fused=fused)
    if s.algorithm == "adamw":
        return torch.optim.AdamW(groups, betas=s.betas, eps=s.eps, fused=fused)
    if s.algorithm == "adamax":
        return torch.optim.Adamax(groups, betas=s.betas, eps=s.eps)
    if s.algorithm == "rmsprop":
        return torch.optim.RMSprop(groups, alpha=s.alpha, eps=s.eps, momentum=s.momentum)
    if s.algorithm == "adagrad":
        return torch.optim.Adagrad(groups, eps=s.eps)
    return torch.optim.SGD(groups, momentum=s.momentum, fused=fused)


def _groups(settings: Optimizer, named: Mapping[str, nn.Parameter]) -> Sequence[dict[str, Any]]:
    """The first pattern that matches a parameter's name decides its group."""
    patterns = {**settings.groups, "*": None}
    members: dict[str, list[nn.Parameter]] = {pattern: [] for pattern in patterns}
    for name, parameter in named.items():
        members[next(p for p in patterns if fnmatch.fnmatchcase(name, p))].append(parameter)
    groups = []
    for pattern, group in patterns.items():
        if not members[pattern]:
            if group is not None:
                raise RecipeError(f"optimiser group {pattern!r} matches no parameter; names: {', '.join(named)}")
            continue
        lr = settings.lr * (group.lr_scale if group else 1.0)
        decay = settings.weight_decay if group is None or group.weight_decay is None else group.weight_decay
        groups.append({"params": members[pattern], "lr": lr, "initial_lr": lr, "weight_decay": decay})
    return groups

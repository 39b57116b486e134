"""What every model in CATALOG must satisfy, as functions: the tests call them, and so do the planted bugs."""

from __future__ import annotations

import copy
import inspect
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dgm_core.capabilities import HasCodes, HasDecoder, HasEnergy, HasLikelihood, HasPosterior
from dgm_core.config import Recipe
from dgm_core.contract import Batch, Clock, DataSpec, GenerativeModel
from dgm_core.data import densities
from dgm_core.training import checkpoint
from dgm_core.training.optimisers import build_players
from dgm_core.training.trainer import Schedule, Trainer
from tests.support import SPECS, CommonNoise, Tensors, equal_states, every_example, examples, grey_width, in_double

Model = type[GenerativeModel]


def build(model: Model, spec: DataSpec, seed: int = 0) -> tuple[GenerativeModel, Recipe]:
    torch.manual_seed(seed)
    config, recipe = model.tiny(spec)
    return model(config, spec), recipe


def short(recipe: Recipe, steps: int, batch_size: int = 12, **changes: Any) -> Recipe:
    """A few rounds of the recipe in float64 without stopping early or evaluating."""
    plain = {"evaluate_every": None, "patience": None, "monitor": None, "microbatch": None}
    return recipe.merged({**plain, "steps": steps, "batch_size": batch_size, "precision": "fp64", **changes})


def tiny_state(model: GenerativeModel) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def config_round_trips(model: Model, spec: DataSpec) -> None:
    for config, recipe in (model.tiny(spec), model.defaults(spec)):
        assert model.Config.model_validate_json(config.model_dump_json()) == config
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        for key in type(config).model_fields:
            with pytest.raises(ValidationError, match=f"did you mean '{key}'"):
                type(config).model_validate({key + "x": None})
            break


def every_parameter_has_one_owner(model: Model, spec: DataSpec) -> None:
    instance, recipe = build(model, spec)
    build_players(instance, recipe)  # raises where a parameter has none or two, or a player no optimiser
    owners = [id(p) for parameters in instance.players().values() for p in parameters]
    assert sorted(owners) == sorted(id(p) for p in instance.parameters())


def a_play_moves_only_its_players(model: Model, spec: DataSpec) -> None:
    instance, recipe = build(model, spec)
    trainer = Trainer(instance, short(recipe, 50), Tensors(in_double(examples(spec, 40))))
    instance.train()
    trainer._open_window()
    for turn in trainer.turns:
        trainer._enter(turn)
        before = {name: p.clone() for name, p in instance.named_parameters()}
        # The second play as well: an output layer that starts at zero gives its inputs no gradient in the first.
        for step in (1, 2, 3):
            trainer._play(turn, Clock(step, 50))
        own = {id(p) for player in turn.players for p in instance.players()[player]}
        moved = {name for name, p in instance.named_parameters() if not torch.equal(p, before[name])}
        theirs = {name for name, p in instance.named_parameters() if id(p) not in own}
        assert not moved & theirs, f"turn {turn.name} moved {sorted(moved & theirs)}"
        assert moved or not turn.players, f"turn {turn.name} moved nothing of {turn.players}"


def loss_is_finite(model: Model, spec: DataSpec) -> None:
    instance, _ = build(model, spec)
    data = Tensors(examples(spec, 40))
    for turn in instance.turns():
        instance.enter(turn.name, data.one_pass(10))
        loss = instance.loss(data.at(0, 10), turn.name, Clock(0, 10))
        assert loss.value.shape == ()
        assert loss.value.isfinite()
        assert all(m.shape == () and not m.requires_grad and m.isfinite() for m in loss.metrics.values())


def evaluation_changes_no_state(model: Model, spec: DataSpec) -> None:
    instance, _ = build(model, spec)
    batch = examples(spec, 10)
    for turn in instance.turns():
        instance.enter(turn.name, Tensors(examples(spec, 40)).one_pass(10))
    instance.eval()
    before = tiny_state(instance)
    every_buffer = {name: b.clone() for name, b in instance.named_buffers()}  # those that are not saved too
    with torch.no_grad():
        for turn in instance.turns():
            instance.loss(batch, turn.name, Clock(0, 10))
        instance.sample(3, context={k: v[:3] for k, v in batch.context.items()})
        use_capabilities(instance, batch)
    changed = equal_states(before, instance.state_dict())
    changed += equal_states(every_buffer, dict(instance.named_buffers()))
    assert not changed, f"evaluation changed {changed}"


def use_capabilities(model: GenerativeModel, batch: Batch) -> None:
    if isinstance(model, HasLikelihood):
        model.log_prob(batch.x, batch.y, batch.context)
    if isinstance(model, HasPosterior):
        model.posterior(batch.x, batch.y, batch.context)
        model.kl(batch.x, batch.y, batch.context)
    if isinstance(model, HasDecoder):
        model.decode(model.draw_latent(len(batch.x)), batch.y, batch.context)
    if isinstance(model, HasCodes):
        model.decode_codes(model.codes(batch.x, batch.y), batch.y, batch.context)
    if isinstance(model, HasEnergy):
        model.free_energy(batch.x)


def samples_look_like_data(model: Model, spec: DataSpec) -> None:
    instance, _ = build(model, spec)
    instance.eval()
    context = {k: v[:5] for k, v in examples(spec, 5).context.items()}
    with torch.no_grad():
        x = instance.sample(5, context=context)
    assert x.shape == (5, *spec.shape)
    assert x.dtype == spec.dtype
    if spec.levels is not None:
        assert 0 <= int(x.min()) <= int(x.max()) < spec.levels
    else:
        assert x.isfinite().all()
    with pytest.raises(TypeError):
        instance.sample(5, context=context, no_such_option=1)  # type: ignore[call-arg]
    for name in model.sample_options():
        assert inspect.signature(model.sample).parameters[name].default is not inspect.Parameter.empty


def probabilities_sum_to_one(model: Model, spec: DataSpec, samples: int = 1) -> None:
    """Over an enumerable space, or by quadrature for real-valued vectors in the plane; at most one for a bound."""
    instance, recipe = build(model, spec)
    trained = short(recipe, 20)
    Trainer(instance, trained, Tensors(in_double(examples(spec, 60)))).fit()
    instance.eval()
    assert isinstance(instance, HasLikelihood)
    with torch.no_grad():
        if spec.levels is None:
            # Trapezoid on ±12: the examples lie within ±4 and what a fit has beyond 12 is below 1e-6.
            axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
            x = torch.cartesian_prod(axis, axis)
            total = instance.log_prob(x).exp().sum().item() * (axis[1] - axis[0]).item() ** 2
            is_one(total, instance.exact, 2e-3)  # the trapezoid's error on Gaussians of sd 0.3 at a step of 0.04
            return
        space = every_example(spec)
        for k in range(max(1, spec.classes)):
            y = torch.full((len(space),), k) if spec.classes else None
            context = {
                name: examples(spec, 1).context[name][:1].expand(len(space), *inner.shape)
                for name, inner in spec.context.items()
            }
            # A bound is one in expectation: what scatters above it is averaged out before it is exponentiated.
            repeats = 1 if instance.exact else 16
            draws = [instance.log_prob(space, y, context, samples=samples) for _ in range(repeats)]
            is_one(torch.stack(draws).mean(0).exp().sum().item(), instance.exact, 1e-6)


def is_one(total: float, exact: bool, tolerance: float) -> None:
    if exact:
        assert abs(total - 1) < tolerance, f"sums to {total}"
    else:
        # Sixteen draws a state leave some scatter, which the exponential turns upwards.
        assert 0.0 < total < 1.1, f"a lower bound sums to {total}"


def runs_on_meta(model: Model, spec: DataSpec) -> None:
    """No tensor is made on another device than the model's, and nothing depends on values."""
    instance, _ = build(model, spec)
    instance = instance.to("meta")
    batch = examples(spec, 10).to("meta")
    for turn in instance.turns():
        loss = instance.loss(batch, turn.name, Clock(0, 10))
        assert loss.value.device.type == "meta"
        if turn.players:
            loss.value.backward()


def resume_is_bitwise(model: Model, spec: DataSpec) -> None:
    data = Tensors(in_double(examples(spec, 40)))
    recipe = short(build(model, spec)[1], 6)
    whole = trained(model, spec, recipe, data, None)
    with tempfile.TemporaryDirectory() as folder:
        rounds = iter(range(100))
        first = trained(model, spec, recipe, data, Path(folder), stop=lambda: next(rounds) >= 2)
        assert first.step == 3
        torch.manual_seed(99)  # another process would not have our generator
        second = trained(model, spec, recipe, data, Path(folder))
    differ = equal_states(checkpoint.model_state(whole.model), checkpoint.model_state(second.model))
    assert not differ, f"after resuming these differ: {differ}"
    for name, player in whole.players.items():
        assert str(player.state_dict()) == str(second.players[name].state_dict())
        if player.average is not None:
            other = second.players[name].average
            assert other is not None
            assert all(torch.equal(a, b) for a, b in zip(player.average, other, strict=True))


def trained(
    model: Model, spec: DataSpec, recipe: Recipe, data: Tensors, folder: Path | None, stop: Any = lambda: False
) -> Trainer:
    instance, _ = build(model, spec)
    schedule = Schedule(log_every=1000, checkpoint_seconds=None)
    trainer = Trainer(instance, recipe, data, folder=folder, schedule=schedule, stop=stop)
    trainer.fit()
    return trainer


def two_ranks_equal_one(model: Model, spec: DataSpec, pool: Any) -> None:
    one = rounds_under_common_noise(model, spec, 0, 1)
    results = pool.run(ranks_share_a_batch, model, spec)
    scale = max(float(v.abs().max()) for v in one.values() if v.is_floating_point())
    for two in results:
        for name, expected in one.items():
            if name in model.chains:
                continue  # a rank's own, by declaration
            got = two[name]
            # float64 sums in another order: 1e-9 of the largest value, after a few rounds of amplification.
            close = torch.allclose(got.double(), expected.double(), rtol=1e-7, atol=1e-9 * scale)
            assert close, (
                f"{name} differs by {(got.double() - expected.double()).abs().max():.3g} between 2 ranks and 1"
            )


def ranks_share_a_batch(model: Model, spec: DataSpec) -> dict[str, Tensor]:
    from dgm_core import distributed

    return rounds_under_common_noise(model, spec, distributed.rank(), distributed.world_size())


def rounds_under_common_noise(model: Model, spec: DataSpec, rank: int, world: int) -> dict[str, Tensor]:
    from dgm_core.distributed import share

    size = 10
    instance, recipe = build(model, spec)
    # Plain gradient descent: Adam would forgive a gradient that is off by a factor.
    plain = {name: {"algorithm": "sgd", "lr": 1e-3, "momentum": 0.0} for name in recipe.optimizers}
    recipe = short(recipe, 3, size, optimizers=plain)
    trainer = Trainer(instance, recipe, Tensors(in_double(examples(spec, 30))))
    torch.manual_seed(7)  # alike on every rank, unlike in real training
    mine = share(size, rank, world)
    with CommonNoise(mine.start, mine.stop - mine.start, size):
        trainer.fit()
    return tiny_state(instance)


def microbatches_equal_one_batch(model: Model, spec: DataSpec) -> None:
    """For models without batch statistics: gradients and settled buffers of three pieces are those of the whole."""
    batch = in_double(examples(spec, 12))
    results = []
    for pieces in (1, 3):
        instance, _ = build(model, spec)
        instance = instance.double().train()
        for turn in instance.turns():
            torch.manual_seed(5)
            instance.enter(turn.name, Tensors(in_double(examples(spec, 30))).one_pass(10))
            size = 12 // pieces
            for i in range(pieces):
                torch.manual_seed(6)
                with CommonNoise(i * size, size, 12):
                    part = batch.rows(slice(i * size, (i + 1) * size))
                    loss = instance.loss(part, turn.name, Clock(0, 10)).value / pieces
                if turn.players:
                    loss.backward()
            with torch.no_grad():
                instance.after(turn.name, Clock(0, 10))
        grads = {f"{n}.grad": p.grad for n, p in instance.named_parameters() if p.grad is not None}
        results.append({**tiny_state(instance), **grads})
    for name, expected in results[0].items():
        # float64 sums in another order.
        assert torch.allclose(results[1][name].double(), expected.double(), rtol=1e-8, atol=1e-10), name


def learns_its_tiny_problem(model: Model, spec: DataSpec) -> None:
    """A likelihood well above independent coordinates'; otherwise samples much nearer to the data than untrained."""
    torch.manual_seed(0)
    train, test = examples(spec, 400), examples(spec, 200, seed=1)
    instance, recipe = build(model, spec)
    untrained = copy.deepcopy(instance)
    trainer = Trainer(
        instance, recipe.merged({"evaluate_every": None, "monitor": None, "patience": None}), Tensors(train)
    )
    trainer.fit()
    with torch.no_grad(), trainer.averaged() as fitted:
        if isinstance(fitted, HasLikelihood) and spec.dims <= 64:
            nll = -fitted.log_prob(test.x, test.y, test.context, samples=8).double().mean().item()
            independent = independent_nll(train.x, test.x, spec)
            # A third of what there is to gain: of two round clusters a linear model, fitted perfectly, gets 41 %.
            bound = independent - (independent - known_entropy(spec)) / 3
            assert nll < bound, f"{nll:.3f} nats; independent coordinates reach {independent:.3f}, bound {bound:.3f}"
            return
        context = dict(test.context)
        before = energy_distance(untrained.eval().sample(200, test.y, context), test.x)
        after = energy_distance(fitted.sample(200, test.y, context), test.x)
        assert after < 0.5 * before, f"energy distance {before:.3f} untrained, {after:.3f} trained"


def independent_nll(train: Tensor, test: Tensor, spec: DataSpec) -> float:
    if spec.levels is None:
        mean, sd = train.mean(0), train.std(0)
        return -torch.distributions.Normal(mean, sd).log_prob(test).flatten(1).sum(1).mean().item()
    counts = torch.stack([(train == k).sum(0) for k in range(spec.levels)]).double() + 0.5
    log_p = (counts / counts.sum(0)).log()
    return -log_p.gather(0, test.long()).flatten(1).sum(1).mean().item()


def known_entropy(spec: DataSpec) -> float:
    """Of `examples`, up to which of the two kinds it is: ln 2 at most."""
    if spec.density:
        return densities.named(**spec.density).entropy()
    if spec.levels is None:
        return spec.dims * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.3))
    flips = -(0.05 * math.log(0.05) + 0.95 * math.log(0.95)) if grey_width(spec) == 1 else 0.0
    return spec.dims * (flips + math.log(grey_width(spec)))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Székely's energy distance between two sets of examples (no square root)."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def docstring_is_complete(model: Model) -> None:
    """Title, authors, year and reference; Departures and Expected."""
    doc = inspect.getdoc(inspect.getmodule(model)) or ""
    assert re.search(r"\b(19|20)\d\d\b", doc), "no year"
    assert re.search(r"arXiv:\S+|doi:\S+|ISBN|NIPS|ICML|PDP", doc), "no reference"
    for section in ("Departures:", "Expected:"):
        assert section in doc, f"no section {section}"
    assert "make results" in doc or "python -m" in doc, "Expected names no command"
    assert model.__doc__


PER_SPEC = (
    config_round_trips,
    every_parameter_has_one_owner,
    a_play_moves_only_its_players,
    loss_is_finite,
    evaluation_changes_no_state,
    samples_look_like_data,
    runs_on_meta,
    resume_is_bitwise,
)
ENUMERABLE = {
    "real_vector": SPECS["real_vector"],
    "binary_vector": SPECS["binary_vector"],
    "tiny_binary_image": DataSpec("image", (1, 2, 3), 2, classes=2),
    "tiny_colour_image": DataSpec("image", (2, 2, 2), 2),
    "tiny_codes": DataSpec("codes", (2, 2), 3, context={"top": DataSpec("codes", (1, 1), 3)}),
    "tiny_audio": DataSpec("audio", (4,), 3, classes=2),
    "tiny_code_sequence": DataSpec("codes", (4,), 3, context={"top": DataSpec("codes", (2,), 3)}),
}

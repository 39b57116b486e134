"""VAE/GAN: what each of the three players descends, who waits for whom, and where its features come from."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from dgm_core import distributed
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.latent.vae_gan import PLAYERS, VAEGAN, unlike, who_moves
from dgm_core.nn.norm import BatchNorm
from dgm_core.training.trainer import Trainer
from tests.contract.checks import short
from tests.support import SPECS, Tensors, examples

GREY = SPECS["grey_image"]
START = Clock(0, 10)


def build(data: DataSpec = GREY, **config: Any) -> VAEGAN:
    torch.manual_seed(0)
    return VAEGAN(VAEGAN.tiny(data)[0].merged(config), data).double().eval()


def played(model: VAEGAN, x: Tensor) -> dict[str, Any]:
    """Each turn's loss under the same noise, and what it is made of, from the paper's equations."""
    losses = {}
    for turn in PLAYERS:
        torch.manual_seed(1)
        losses[turn] = model.loss(Batch(x), turn, START)
    torch.manual_seed(1)
    q = model.posterior(x)
    z = q.mean + q.stddev * torch.randn(len(x), 1, model.config.latents, dtype=torch.float64)[:, 0]
    sampled = model.draw_latent(len(x))
    spread = 2 * x.double() / 255 - 1
    f, again = (model.discriminator.below(image) for image in (spread, model.decoder(z)))
    D, D_again, D_sampled = (
        model.discriminator(image)[0].sigmoid() for image in (spread, model.decoder(z), model.decoder(sampled))
    )
    prior = Independent(Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean)), 1)
    return {
        **losses,
        "prior": kl_divergence(q, prior).mean(),
        "like": 0.5 * (f - again).square().flatten(1).sum(1).mean(),
        "real": D.log().mean(),
        "made": (1 - D_again).log().mean() + (1 - D_sampled).log().mean(),
        "fooling": -D_again.log().mean() - D_sampled.log().mean(),
    }


def test_the_three_losses_are_the_papers():
    model, x = build(gamma=0.3, objective="minimax"), examples(GREY, 12).x
    p = played(model, x)
    like, prior, made = p["like"].item(), p["prior"].item(), p["made"].item()
    assert p["encoder"].value.item() == pytest.approx(prior + like)
    assert p["encoder"].metrics["kl_nats"].item() == pytest.approx(prior)
    assert p["encoder"].metrics["unlike_nats"].item() == pytest.approx(like)
    assert p["decoder"].value.item() == pytest.approx(0.3 * like + made)
    # Both kinds of fake together weigh as much as the data.
    assert p["discriminator"].value.item() == pytest.approx(-p["real"].item() - 0.5 * made)
    generous = build(gamma=0.3, objective="non_saturating")
    assert played(generous, x)["decoder"].value.item() == pytest.approx(0.3 * like + p["fooling"].item())


def test_no_error_is_fed_to_whom_it_does_not_concern():
    """L_GAN's does not reach the encoder, nor L_like's the discriminator's turn; each player has all of its own."""
    model, x = build(gamma=0.3), examples(GREY, 12).x
    p = played(model, x)
    concerned = {"encoder": PLAYERS, "decoder": ("decoder", "discriminator"), "discriminator": ("discriminator",)}
    for turn in PLAYERS:
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(p[turn].value, list(parameters.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            player = name.split(".")[0]
            if player not in concerned[turn]:
                assert grad is None, f"{turn}'s turn reaches {name}"
            elif player == turn:
                assert grad is not None, f"{turn}'s turn does not reach {name}"
                assert grad.abs().max() > 0


def test_the_decoder_descends_a_weighted_sum():
    model, x = build(gamma=0.3, objective="minimax"), examples(GREY, 12).x
    p = played(model, x)
    mine = list(model.decoder.parameters())
    expected = torch.autograd.grad(0.3 * p["like"] + p["made"], mine)
    for found, wanted in zip(torch.autograd.grad(p["decoder"].value, mine), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)  # float64, batches split otherwise


def test_the_features_of_the_data_are_a_target():
    f = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    value = unlike(f, other)
    # −log N(f; other, I), an example, but for its constant.
    log_normal = Normal(other, 1.0).log_prob(f).flatten(1).sum(1).mean()
    assert value.item() == pytest.approx(-log_normal.item() - 16 * math.log(2 * math.pi))
    value.backward()
    assert f.grad is None
    torch.testing.assert_close(other.grad, (other - f).detach() / 3)


def scores_of(real: float, fake: float) -> tuple[Tensor, Tensor]:
    """Scores whose errors −log D(x) and −log(1 − D(x̃)) are these on average, though not one by one."""
    spread = torch.tensor([-0.2, -0.1, 0.0, 0.3], dtype=torch.float64)
    return -(real + spread).expm1().log(), (fake + spread).expm1().log()


@pytest.mark.parametrize(("real", "fake"), list(product([0.3, 0.68, 1.1], repeat=2)))
def test_whoever_is_too_far_ahead_waits(real, fake):
    """The authors' rule, case by case: below 0.33 D is ahead, above 1.03 it is behind, and both at once is neither."""
    moves = who_moves(*scores_of(real, fake), 0.68, 0.35)
    ahead, behind = min(real, fake) < 0.33, max(real, fake) > 1.03
    if ahead and behind:
        expected = {"decoder": 1.0, "discriminator": 1.0}
    else:
        expected = {"decoder": float(not behind), "discriminator": float(not ahead)}
    assert {player: moved.item() for player, moved in moves.items()} == expected


def ranks_decide() -> dict[str, float]:
    """Of four examples, three of them on the last rank; either rank alone would decide otherwise."""
    mine = slice(0, 4) if distributed.world_size() == 1 else (slice(0, 1), slice(1, 4))[distributed.rank()]
    errors = torch.tensor([3.1, 0.1, 0.2, 0.4], dtype=torch.float64)[mine]  # 0.95 on average
    moves = who_moves(-errors.expm1().log(), torch.zeros_like(errors), 0.68, 0.35)
    return {player: moved.item() for player, moved in moves.items()}


def test_all_ranks_decide_together(two_ranks):
    """Rank 0 alone has a D far behind, rank 1 one far ahead; together nobody waits."""
    assert ranks_decide() == {"decoder": 1.0, "discriminator": 1.0}
    assert two_ranks.run(ranks_decide) == [ranks_decide()] * 2


@pytest.mark.parametrize(
    ("equilibrium", "waits"), [(9.0, {"discriminator"}), (1e-3, {"decoder"}), (0.68, set[str]())], ids=str
)
def test_who_waits_does_not_move_at_all(equilibrium, waits):
    """Its parameters and its optimiser's averages stay as they were, bit by bit; everyone else moves on."""
    margin = 0.35 if equilibrium == 0.68 else 1e-4
    model = build(equilibrium=equilibrium, margin=margin)
    recipe = short(VAEGAN.tiny(GREY)[1], 3)
    trainer = Trainer(model, recipe, Tensors(examples(GREY, 36)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.fit()
    for name, p in model.named_parameters():
        player = name.split(".")[0]
        assert torch.equal(p, before[name]) == (player in waits), name
    for name, player in trainer.players.items():
        averages = [s["exp_avg"] for s in player.optimizer.state.values()]
        assert all((a == 0).all() for a in averages) == (name in waits)


def test_without_a_margin_nobody_waits():
    model = build(margin=None, equilibrium=9.0)
    assert all(not model.loss(Batch(examples(GREY, 12).x), turn, START).gate for turn in PLAYERS)


def test_the_features_are_the_papers_layers():
    """Third strided convolution of 64 × 64 images, second of 32 × 32, in front of the norm."""
    for data, size in (
        (DataSpec("image", (3, 64, 64), 256), (256, 8, 8)),
        (DataSpec("image", (3, 32, 32), 256), (192, 8, 8)),
    ):
        config, recipe = VAEGAN.defaults(data)
        with torch.device("meta"):
            model = VAEGAN(config, data)
            f = model.discriminator.features(torch.zeros(2, *data.shape))
            assert f.shape == (2, *size)
            assert model.decoder(model.draw_latent(2)).shape == (2, *data.shape)
        assert isinstance(model.discriminator.below[-1], nn.Conv2d)
        assert isinstance(model.discriminator.above[0], BatchNorm)
        assert recipe.batch_size == 64


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 7, 13), (2, 1, 5)])
@pytest.mark.parametrize("layer", [1, 2])
def test_networks_fit_images_of_any_size(shape, layer):
    data = DataSpec("image", shape, 256)
    model = build(data, layer=layer)
    x = model.sample(5)
    assert x.shape == (5, *shape)
    scores, f = model.discriminator(torch.randn(5, *shape, dtype=torch.float64))
    assert scores.shape == (5,)
    sides = [-(-n // 2**layer) for n in shape[1:]]  # halved with rounding up: the ceiling of n / 2ᵏ
    assert f.shape == (5, model.config.discriminator_channels[layer], *sides)
    for turn in PLAYERS:
        assert model.loss(Batch(x), turn, START).value.isfinite()


def test_weights_start_within_their_bound():
    model = VAEGAN(*VAEGAN.tiny(GREY)[:1], GREY)
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            reach = 1 / math.sqrt(3 * part.weight[0].numel())
            # Of fifty and more uniform draws the largest is within a tenth of the bound, but once in 200.
            assert 0.9 * reach < part.weight.abs().max() <= reach
            assert part.bias is None or (part.bias == 0).all()


def test_only_bounded_data_has_a_bounded_decoder():
    real = DataSpec("image", (1, 8, 8), None)
    for data, bounded in ((GREY, True), (real, False)):
        model = build(data)
        with torch.no_grad():
            model.decoder[-2 if bounded else -1].bias.fill_(5.0)
        mean = model.decode(model.draw_latent(3))
        assert bool((mean <= 255).all())
        assert bool((mean > 254.9).all()) == bounded  # tanh 5 is the brightest grey; elsewhere 5 is 5


def test_temperature_and_the_closed_divergence():
    model, x = build(), examples(GREY, 6).x
    still = model.sample(4, temperature=0.0)
    mean = model.decode(torch.zeros(4, model.config.latents, dtype=torch.float64))
    assert torch.equal(still, mean.round().to(torch.uint8))
    q = model.posterior(x)
    standard = Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
    torch.testing.assert_close(model.kl(x), kl_divergence(q.base_dist, standard))


def test_calibration_averages_the_statistics_of_both_networks_over_the_data():
    model, batches = build(), [Batch(examples(GREY, 10, seed=s).x) for s in range(3)]
    first, norm = model.encoder[0], model.encoder[1]
    assert isinstance(norm, BatchNorm)
    start = model.decoder[1]
    assert isinstance(start, BatchNorm)
    before = start.moments.running_mean.clone()
    with torch.no_grad():
        model.calibrate(iter(batches), passes=2)
        seen = [first(2 * b.x.double() / 255 - 1) for b in batches[:2]]  # as many batches as passes
    expected = torch.stack([h.mean((0, 2, 3)) for h in seen]).mean(0)
    torch.testing.assert_close(norm.moments.running_mean, expected)
    assert not torch.equal(start.moments.running_mean, before)
    assert not model.training


def test_verdicts_are_of_data_and_fakes():
    model, x = build(), examples(GREY, 12).x
    with torch.no_grad():
        model.discriminator.above[-1].weight.zero_()
        model.discriminator.above[-1].bias.fill_(1.0)  # D takes everything for data
    metrics = model.loss(Batch(x), "discriminator", START).metrics
    assert metrics["accuracy_real"].item() == 1
    assert metrics["accuracy_fake"].item() == 0
    # Errors −log σ(1) = 0.31 and −log(1 − σ(1)) = 1.31: both sides would wait, so neither does.
    assert F.softplus(torch.tensor(-1.0)) < 0.33
    assert metrics["moves"].item() == 1


@pytest.mark.parametrize("name", ["real_vector", "codes", "audio"])
def test_it_refuses_what_is_no_image(name):
    with pytest.raises(DataMismatch, match="Use vae"):
        VAEGAN(VAEGAN.tiny(SPECS[name])[0], SPECS[name])


def test_it_refuses_a_layer_that_is_not_there():
    with pytest.raises(ValidationError, match="has 3 strided ones"):
        VAEGAN.Config(layer=4)

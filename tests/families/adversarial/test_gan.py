"""GAN: equation 1 to the letter, the authors' MNIST networks and optimiser."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.adversarial.gan import GAN
from dgm_core.nn.gan_blocks import Maxout
from dgm_core.training.optimisers import lr_factor

PLANE = DataSpec("vector", (2,), None)
MNIST = DataSpec("image", (1, 28, 28), 256)
CLOCK = Clock(0, 10)


def build(**overrides: object) -> GAN:
    torch.manual_seed(0)
    config, _ = GAN.tiny(PLANE)
    return GAN(config.merged(overrides), PLANE).double()


def probabilities(model: GAN, x: Tensor) -> Tensor:
    return model.discriminator(x).sigmoid()


@pytest.mark.parametrize("objective", ["minimax", "non_saturating"])
def test_both_turns_are_the_papers(objective: str) -> None:
    model, x = build(objective=objective), torch.randn(6, 2, dtype=torch.float64)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "discriminator", CLOCK)
    torch.manual_seed(1)
    theirs = model.loss(Batch(x), "generator", CLOCK)
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64))
    value = probabilities(model, x).log().mean() + (1 - probabilities(model, fake)).log().mean()
    # The same numbers but for rounding in the logarithm of a sigmoid.
    torch.testing.assert_close(loss.value, -value, rtol=0, atol=1e-12)
    wanted = (1 - probabilities(model, fake)).log() if objective == "minimax" else -probabilities(model, fake).log()
    torch.testing.assert_close(theirs.value, wanted.mean(), rtol=0, atol=1e-12)
    assert loss.metrics["accuracy_real"] == (probabilities(model, x) > 0.5).double().mean()
    assert loss.metrics["accuracy_fake"] == (probabilities(model, fake) < 0.5).double().mean()


def test_minimax_is_one_game() -> None:
    """The generator's gradient is minus that of the discriminator's loss: what one gains the other loses."""
    model, x = build(objective="minimax"), torch.randn(6, 2, dtype=torch.float64)
    torch.manual_seed(1)
    parameters = list(model.generator.parameters())
    found = torch.autograd.grad(model.loss(Batch(x), "generator", CLOCK).value, parameters)
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64))
    whole = F.softplus(-model.discriminator(x)).mean() + F.softplus(model.discriminator(fake)).mean()
    for a, b in zip(found, torch.autograd.grad(whole, parameters), strict=True):
        torch.testing.assert_close(a, -b, rtol=0, atol=1e-14)


def test_images_are_the_authors_mnist_configuration() -> None:
    config, recipe = GAN.defaults(MNIST)
    model = GAN(config, MNIST)
    assert [(m.in_features, m.out_features) for m in model.generator.modules() if isinstance(m, nn.Linear)] == [
        (100, 1200), (1200, 1200), (1200, 784)
    ]  # fmt: skip
    assert [m.shape for m in model.discriminator.modules() if isinstance(m, Maxout)] == [(240, 5), (240, 5)]
    assert [m.p for m in model.discriminator.modules() if isinstance(m, nn.Dropout)] == [0.2, 0.5, 0.5]
    for network, reach in ((model.generator, 0.05), (model.discriminator, 0.005)):
        weights = torch.cat([m.weight.flatten() for m in network.modules() if isinstance(m, nn.Linear)])
        # Among hundreds of thousands of draws the greatest is within a thousandth of the end.
        assert weights.abs().max().item() == pytest.approx(reach, rel=1e-3)
    assert {(o.algorithm, o.momentum) for o in recipe.optimizers.values()} == {("sgd", 0.7)}
    assert recipe.optimizers["generator"].lr == 2 * recipe.optimizers["discriminator"].lr == 0.1
    factor = lr_factor(recipe.optimizers["generator"], Clock(1000, recipe.steps))
    assert factor == pytest.approx(1.000004**-1000, rel=1e-9)


def test_dropout_acts_in_training_only() -> None:
    spec = DataSpec("image", (1, 8, 8), 256)
    model = GAN(GAN.Config(latents=4, features=8, units=16, pieces=2), spec)
    x = torch.randn(5, 1, 8, 8)
    assert not torch.equal(model.discriminator(x), model.discriminator(x))
    model.eval()
    assert torch.equal(model.discriminator(x), model.discriminator(x))

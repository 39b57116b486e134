"""cGAN and AC-GAN: their equations to the letter, and who sees the label."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.adversarial.ac_gan import ACGAN
from dgm_core.models.adversarial.cgan import CGAN
from dgm_core.nn.gan_blocks import Maxout
from dgm_core.nn.norm import BatchNorm

PLANE = DataSpec("vector", (2,), None, classes=3)
MNIST = DataSpec("image", (1, 28, 28), 256, classes=10)
CIFAR = DataSpec("image", (3, 32, 32), 256, classes=10)
CLOCK = Clock(0, 10)
Y = torch.tensor([0, 2, 1, 1, 0, 2])


def batch() -> Batch:
    torch.manual_seed(2)
    return Batch(torch.randn(6, 2, dtype=torch.float64), Y)


def cgan() -> CGAN:
    torch.manual_seed(0)
    config, _ = CGAN.tiny(PLANE)
    return CGAN(config.merged({"dropout": 0.0}), PLANE).double()


def ac_gan(**overrides: object) -> ACGAN:
    torch.manual_seed(0)
    config, _ = ACGAN.tiny(PLANE)
    return ACGAN(config.merged(overrides), PLANE).double()


def test_cgan_is_equation_2_given_the_label() -> None:
    model, given = cgan(), batch()
    torch.manual_seed(1)
    loss = model.loss(given, "discriminator", CLOCK)
    torch.manual_seed(1)
    theirs = model.loss(given, "generator", CLOCK)
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64), Y)
    real_p, fake_p = model.discriminator(given.x, Y).sigmoid(), model.discriminator(fake, Y).sigmoid()
    # The same numbers but for rounding in the logarithm of a sigmoid.
    torch.testing.assert_close(loss.value, -(real_p.log() + (1 - fake_p).log()).mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(theirs.value, -fake_p.log().mean(), rtol=0, atol=1e-12)


def test_both_of_cgans_networks_see_the_label() -> None:
    model, given = cgan(), batch()
    other = (Y + 1) % 3
    assert not torch.equal(model.discriminator(given.x, Y), model.discriminator(given.x, other))
    z = model.draw_latent(6)
    assert not torch.equal(model.generator(z, Y), model.generator(z, other))


def test_cgan_on_images_is_the_papers_mnist_networks() -> None:
    model = CGAN(CGAN.defaults(MNIST)[0], MNIST)
    linear = [(m.in_features, m.out_features) for m in model.generator.modules() if isinstance(m, nn.Linear)]
    assert linear == [(100, 200), (10, 1000), (1200, 1200), (1200, 784)]
    maxout = [(m.linear.in_features, m.shape) for m in model.discriminator.modules() if isinstance(m, Maxout)]
    assert maxout == [(784, (240, 5)), (10, (50, 5)), (290, (240, 4))]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.5}


@pytest.mark.parametrize("objective", ["minimax", "non_saturating"])
def test_ac_gan_is_equations_2_and_3(objective: str) -> None:
    model, given = ac_gan(objective=objective), batch()
    torch.manual_seed(1)
    loss = model.loss(given, "discriminator", CLOCK)
    torch.manual_seed(1)
    theirs = model.loss(given, "generator", CLOCK)
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64), Y)
    (real_score, real_logits), (fake_score, fake_logits) = model.discriminator(given.x), model.discriminator(fake)
    rows = torch.arange(6)
    of_fake = fake_logits.softmax(1)[rows, Y].log().mean()
    source = real_score.sigmoid().log().mean() + (1 - fake_score.sigmoid()).log().mean()
    named = real_logits.softmax(1)[rows, Y].log().mean() + of_fake
    # The same numbers but for rounding in logarithms of sigmoids and softmaxes; so below.
    torch.testing.assert_close(loss.value, -(source + named), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.metrics["source_loss"], -source.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss.metrics["class_loss"], -named.detach(), rtol=0, atol=1e-12)
    p = fake_score.sigmoid()
    own = (1 - p).log().mean() if objective == "minimax" else -p.log().mean()
    torch.testing.assert_close(theirs.value, own - of_fake, rtol=0, atol=1e-12)


def test_both_players_gain_by_the_right_name() -> None:
    """Along the discriminator's class head alone, its loss and the generator's have one descent direction."""
    model, given = ac_gan(), batch()
    bias = model.discriminator.heads.bias
    torch.manual_seed(1)
    (mine,) = torch.autograd.grad(model.loss(given, "generator", CLOCK).value, bias)
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, model.latents, dtype=torch.float64), Y)
    of_fake = F.cross_entropy(model.discriminator(fake)[1], Y)
    (wanted,) = torch.autograd.grad(of_fake, bias)
    torch.testing.assert_close(mine[1:], wanted[1:], rtol=0, atol=1e-14)
    of_data = F.cross_entropy(model.discriminator(given.x)[1], Y)
    torch.manual_seed(1)
    (theirs,) = torch.autograd.grad(model.loss(given, "discriminator", CLOCK).value, bias)
    (rest,) = torch.autograd.grad(of_data, bias)
    torch.testing.assert_close(theirs[1:] - rest[1:], mine[1:], rtol=0, atol=1e-14)


def test_class_accuracy_counts_the_examples_named_right() -> None:
    model, given = ac_gan(), batch()
    with torch.no_grad():
        heads = model.discriminator.heads
        heads.weight.zero_()
        heads.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 5.0]))  # everything is of class 2
    metrics = model.loss(given, "discriminator", CLOCK).metrics
    assert metrics["class_accuracy_real"].item() == metrics["class_accuracy_fake"].item() == pytest.approx(2 / 6)


def test_ac_gan_on_images_is_the_papers_cifar_networks() -> None:
    model = ACGAN(ACGAN.defaults(CIFAR)[0], CIFAR)
    up = [(m.in_channels, m.out_channels) for m in model.generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert up == [(384, 192), (192, 96), (96, 3)]
    down = [m for m in model.discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in down] == [16, 32, 64, 128, 256, 512]
    assert [m.stride for m in down] == [(2, 2), (1, 1)] * 3
    assert sum(isinstance(m, BatchNorm) for m in model.discriminator.modules()) == 5
    assert model.discriminator.heads.in_features == 4 * 4 * 512
    assert model.discriminator.heads.out_features == 11

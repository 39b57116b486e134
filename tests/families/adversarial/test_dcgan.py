"""DCGAN: the loss, statistics of batches of their own, and running averages that stand in for them."""

import torch
import torch.nn.functional as F

from dgm_core.contract import Batch, Clock, DataSpec
from dgm_core.models.adversarial.dcgan import DCGAN
from dgm_core.nn.norm import Moments

GREY = DataSpec("image", (2, 16, 16), 256)
CLOCK = Clock(0, 10)


def build() -> DCGAN:
    torch.manual_seed(0)
    return DCGAN(DCGAN.Config(latents=5, features=4), GREY).double()


def test_losses_are_of_batches_of_their_own() -> None:
    model, x = build(), torch.randint(0, 256, (6, 2, 16, 16), dtype=torch.uint8)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "discriminator", CLOCK)
    torch.manual_seed(1)
    theirs = model.loss(Batch(x), "generator", CLOCK)
    torch.manual_seed(1)
    fake = model.generator(torch.randn(6, 5, dtype=torch.float64))
    real = (x + torch.rand(x.shape, dtype=torch.float64)) / 128 - 1
    scores = model.discriminator(real), model.discriminator(fake)
    expected = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
    torch.testing.assert_close(loss.value, expected, rtol=0, atol=0)
    torch.testing.assert_close(theirs.value, F.softplus(-scores[1]).mean(), rtol=0, atol=0)
    mixed = model.discriminator(torch.cat([real, fake]))
    assert not torch.allclose(mixed[:6], scores[0])


def test_running_averages_move_once_a_play() -> None:
    """The discriminator passes two batches a play: one step of the average, towards the mean of their moments."""
    model, x = build(), torch.randint(0, 256, (6, 2, 16, 16), dtype=torch.uint8)
    (moments,) = [m for m in model.discriminator.modules() if isinstance(m, Moments)]
    model.loss(Batch(x), "discriminator", CLOCK)
    (first, _), (second, _) = moments.noted
    model.after("discriminator", CLOCK)
    torch.testing.assert_close(moments.running_mean, 0.1 * (first + second) / 2, rtol=0, atol=1e-14)
    assert not moments.noted


def test_calibration_makes_evaluation_agree_with_training() -> None:
    model = build()
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.05 * torch.randn_like(p))
        z = model.draw_latent(500)
        wanted = model.generator(z)
        model.eval()
        before = (model.generator(z) - wanted).abs().mean()
        model.calibrate(iter([]), passes=8, batch_size=250)
        after = (model.generator(z) - wanted).abs().mean()
    # Statistics of 2000 draws against those of 500: an error of some 1/√500 = 4 % of a unit, then a tanh.
    assert after < 0.06 < before

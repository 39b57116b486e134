"""WGAN-GP: equation 3 to the letter, networks for every size, data units on both ends."""

import pytest
import torch
from torch import Tensor

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.adversarial.wgan_gp import WGANGP, ResNetCritic, ResNetGenerator
from dgm_core.nn.norm import LayerNorm

PLANE = DataSpec("vector", (2,), None)
BITS = DataSpec("vector", (6,), 2)
GREY = DataSpec("image", (1, 8, 8), 256)
CLOCK = Clock(0, 10)


def build(spec: DataSpec, **overrides: object) -> WGANGP:
    config, _ = WGANGP.tiny(spec)
    return WGANGP(config.merged(overrides), spec).double()


def data(spec: DataSpec, n: int) -> Tensor:
    if spec.levels is None:
        return torch.tensor([10.0, -3.0], dtype=torch.float64) + torch.randn(n, *spec.shape, dtype=torch.float64)
    return torch.randint(0, spec.levels, (n, *spec.shape)).to(spec.dtype)


@pytest.mark.parametrize("spec", [PLANE, GREY], ids=["vector", "image"])
def test_critic_minimises_equation_3(spec: DataSpec) -> None:
    model = build(spec, gradient_penalty=7.0)
    x = data(spec, 5)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "critic", CLOCK)

    torch.manual_seed(1)
    fake = model.generator(torch.randn(5, model.latents, dtype=torch.float64)).detach()
    real = x.double() if spec.levels is None else (x + torch.rand(x.shape, dtype=torch.float64)) / 128 - 1
    epsilon = torch.rand(5, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(5):  # one example at a time: nothing may leak between them
        between = (epsilon[i] * real[i] + (1 - epsilon[i]) * fake[i])[None].requires_grad_()
        (gradient,) = torch.autograd.grad(model.critic(between).sum(), between)
        total += (model.critic(fake[i : i + 1]) - model.critic(real[i : i + 1]))[0] / 5
        total += 7.0 * (gradient.norm() - 1) ** 2 / 5
    # The guard of 10⁻¹² under the root moves a norm of order 0.01 or more by less than 10⁻¹⁰.
    torch.testing.assert_close(loss.value, total, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        loss.value.detach(), 7.0 * loss.metrics["gradient_penalty"] - loss.metrics["wasserstein"], rtol=0, atol=1e-12
    )


def test_the_penalty_moves_the_critic_but_the_generator_only_in_its_turn() -> None:
    model = build(PLANE)
    x = data(PLANE, 8)
    model.loss(Batch(x), "critic", CLOCK).value.backward()
    assert all(p.grad is None for p in model.generator.parameters())
    assert all(p.grad is not None for p in model.critic.parameters())
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "generator", CLOCK)
    torch.manual_seed(1)
    scores = model.critic(model.generator(torch.randn(8, model.latents, dtype=torch.float64)))
    torch.testing.assert_close(loss.value, -scores.mean(), rtol=0, atol=1e-12)


def test_turns_are_algorithm_1() -> None:
    turns = build(PLANE, critic_steps=3).turns()
    assert [(t.name, t.players, t.repeat) for t in turns] == [
        ("critic", ("critic",), 3),
        ("generator", ("generator",), 1),
    ]


@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (1, 16, 16), (3, 28, 28), (2, 12, 20), (3, 32, 32), (1, 64, 64), (1, 36, 8)]
)
def test_networks_for_every_size(shape: tuple[int, int, int]) -> None:
    spec = DataSpec("image", shape, 256)
    with torch.device("meta"):
        model = WGANGP(WGANGP.Config(latents=7, features=6), spec)
        z = torch.randn(3, 7)
        fake = model.generator(z)
        assert fake.shape == (3, *shape)
        assert model.critic(fake).shape == (3,)


def test_32_pixels_are_the_papers_networks() -> None:
    """Appendix F, CIFAR-10: a 4 × 4 grid doubled three times; the critic halves twice of four blocks."""
    generator, critic = ResNetGenerator(128, (3, 32, 32), 128), ResNetCritic((3, 32, 32), 128, LayerNorm)
    assert generator.grid == (128, 4, 4)
    assert [b.resample for b in generator.blocks] == ["up", "up", "up"]  # type: ignore[union-attr]
    assert [b.resample for b in critic.blocks] == ["down", None, None]  # type: ignore[union-attr]
    # Counted by hand from the paper's table: 3 × 3 kernels with biases, 1 × 1 shortcuts where resolution changes.
    three, one = 128 * 128 * 9 + 128, 128 * 128 + 128
    assert sum(p.numel() for p in generator.parameters()) == (
        (128 * 2048 + 2048) + 3 * (2 * three + one + 4 * 128) + 2 * 128 + (128 * 27 + 3)
    )
    assert sum(p.numel() for p in critic.parameters()) == (
        (27 * 128 + 128 + three + 3 * 128 + 128) + (2 * three + one + 4 * 128) + 2 * (2 * three + 4 * 128) + 129
    )


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_critic_keeps_examples_apart(norm: str) -> None:
    model = build(GREY, critic_norm=norm)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    together = model.critic(x)
    apart = torch.cat([model.critic(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)  # other batch size, other order of summation
    assert any(isinstance(m, LayerNorm) for m in model.critic.modules()) == (norm == "layer")


@pytest.mark.parametrize("spec", [BITS, GREY], ids=["bits", "grey"])
def test_samples_are_data(spec: DataSpec) -> None:
    model = build(spec).eval()
    with torch.no_grad():
        for p in model.generator.parameters():
            p.mul_(3)  # so that both ends of the range are reached
        x, mean = model.sample(400), model.decode(model.draw_latent(400))
    assert x.dtype == torch.uint8
    assert x.shape == (400, *spec.shape)
    assert x.max() >= spec.levels / 2 > x.min()  # type: ignore[operator]
    assert mean.min() >= 0
    assert mean.max() <= spec.levels - 1  # type: ignore[operator]


def test_every_level_comes_back_from_the_network() -> None:
    model = build(GREY)
    levels = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    network = model.to_network(levels)
    assert -1 <= network.min() < network.max() < 1
    assert torch.equal(model.to_data(network).floor().to(torch.uint8), levels)


def test_real_data_is_standardised_once() -> None:
    model = build(PLANE)
    x = data(PLANE, 3000) * torch.tensor([5.0, 0.1])
    batches = [Batch(part) for part in x.split(1000)]
    model.enter("generator", iter(batches))
    assert torch.equal(model.to_network(x), x)
    model.enter("critic", iter(batches))
    network = model.to_network(x)
    # The moments are kept in the model's float64, the sums are exact to 10⁻¹⁶ of 10⁴ terms.
    torch.testing.assert_close(network.mean(0), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(network.std(0, correction=0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(model.to_data(network), x, rtol=0, atol=1e-9)


def test_calibration_makes_evaluation_agree_with_training() -> None:
    """Running statistics that never saw these parameters are replaced by those of the generator's own noise."""
    model = build(GREY)
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.2 * torch.randn_like(p))
        z = model.draw_latent(500)
        wanted = model.generator(z)  # training mode: the batch's own statistics
        model.eval()
        before = (model.generator(z) - wanted).abs().mean()
        model.calibrate(iter([]), passes=8, batch_size=250)
        after = (model.generator(z) - wanted).abs().mean()
    assert not model.training
    # Statistics of 2000 draws against those of 500: an error of some 1/√500 = 4 % of a unit, then a tanh.
    assert after < 0.06 < before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec("image", (1, 10, 12), 256), "multiples of 4"),
        (DataSpec("image", (1, 4, 4), 256), "at least 8"),
        (DataSpec("audio", (16,), 256), "kind 'audio'"),
    ],
)
def test_refuses_what_it_cannot_model(spec: DataSpec, message: str) -> None:
    with pytest.raises(DataMismatch, match=message):
        WGANGP(WGANGP.Config(), spec)

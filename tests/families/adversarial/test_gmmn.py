"""GMMN: what it descends, in which space, and when the auto-encoder learns."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.adversarial.gmmn import GMMN
from dgm_core.objectives.mmd import MMD
from tests.contract import checks
from tests.families.adversarial.gmmn_variants import InCodes, Unbiased
from tests.support import SPECS, TwoRanks

PLANE = DataSpec("vector", (2,), None)
GREY = DataSpec("image", (1, 8, 8), 256)
MNIST = DataSpec("image", (1, 28, 28), 256)
CLOCK = Clock(0, 10)
# The same float64 operations but for the order of sums.
EXACT = {"rtol": 0, "atol": 1e-12}
VARIANT_CHECKS = [c for c in checks.PER_SPEC if c is not checks.config_round_trips]


def build(spec: DataSpec, **overrides: object) -> GMMN:
    torch.manual_seed(0)
    return GMMN(GMMN.tiny(spec)[0].merged(overrides), spec).double()


def grey(n: int) -> Tensor:
    return torch.randint(0, 256, (n, 1, 8, 8)).to(torch.uint8)


@pytest.mark.parametrize("root", [True, False])
def test_data_space_is_the_discrepancy_of_pixels_in_the_unit_interval(root: bool) -> None:
    model, x = build(GREY, root=root, bandwidths=(1.0, 3.0)), grey(6)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "generator", CLOCK)
    torch.manual_seed(1)
    target = (x + torch.rand(x.shape, dtype=torch.float64)) / 256
    z = 2 * torch.rand(6, model.latents, dtype=torch.float64) - 1
    wanted = MMD((1.0, 3.0), root=root)(model.generator(z), target)
    torch.testing.assert_close(loss.value, wanted, **EXACT)
    torch.testing.assert_close(loss.metrics["mmd2"], (wanted**2 if root else wanted).detach(), **EXACT)


def test_code_space_compares_codes_and_decodes_samples() -> None:
    model, x = build(GREY, space="code").train(), grey(6)
    auto = model.autoencoder
    assert auto is not None
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "generator", CLOCK)  # in training mode, yet without the encoder's dropout
    torch.manual_seed(1)
    h = ((x + torch.rand(x.shape, dtype=torch.float64)) / 256).flatten(1)
    for layer in auto.encoder:
        h = layer(h).sigmoid()
    z = 2 * torch.rand(6, model.latents, dtype=torch.float64) - 1
    made = model.generator(z)
    torch.testing.assert_close(loss.value, MMD(model.mmd.bandwidths, root=True)(made, h), **EXACT)
    assert made.shape == h.shape
    for layer in auto.decoder:
        made = layer(made).sigmoid()
    torch.testing.assert_close(model.generate(z, None).flatten(1), made, **EXACT)


@pytest.mark.parametrize("spec", [PLANE, GREY], ids=["real", "grey"])
def test_the_autoencoder_learns_to_reconstruct(spec: DataSpec) -> None:
    """Cross-entropy of what lies in [0, 1], squared error of the rest; with dropout in training mode alone."""
    model = build(spec, space="code", dropout=(0.5, 0.5)).eval()
    assert model.autoencoder is not None
    x = grey(5) if spec is GREY else torch.randn(5, 2, dtype=torch.float64)
    torch.manual_seed(1)
    loss = model.loss(Batch(x), "autoencoder", CLOCK).value
    torch.manual_seed(1)
    target = model.to_network(x).flatten(1)
    out = model.autoencoder.decode(model.autoencoder.encode(target))
    if spec is GREY:
        p = out.sigmoid()
        wanted = -(target * p.log() + (1 - target) * (1 - p).log()).sum(1).mean()
    else:
        wanted = (out - target).square().sum(1).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)  # rounding in the logarithm of a sigmoid
    torch.manual_seed(1)
    assert model.train().loss(Batch(x), "autoencoder", CLOCK).value != loss


def test_the_autoencoder_comes_first_and_then_stands_still() -> None:
    first, second = build(GREY, space="code", autoencoder_share=0.25).turns()
    live = [[turn.name for turn in (first, second) if turn.live(Clock(t, 8))] for t in range(8)]
    assert live == [["autoencoder"]] * 2 + [["generator"]] * 6
    assert [turn.name for turn in build(GREY).turns()] == ["generator"]


@pytest.mark.parametrize(("turn", "player"), [("autoencoder", "autoencoder"), ("generator", "generator")])
def test_a_turn_reaches_every_parameter_of_its_player_and_no_other(turn: str, player: str) -> None:
    model = build(GREY, space="code")
    model.loss(Batch(grey(16)), turn, CLOCK).value.backward()
    mine = {id(p) for p in model.players()[player]}
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == (id(p) in mine), name


def test_noise_is_uniform_on_the_cube() -> None:
    z = build(GREY).draw_latent(4000)
    assert -1 <= z.min() < -0.99 < 0.99 < z.max() <= 1
    assert z.mean().abs() < 0.03  # 16,000 numbers of variance ⅓: standard error 0.005
    assert abs(z.var().item() - 1 / 3) < 0.02


def test_images_are_the_authors_mnist_networks() -> None:
    model = GMMN(GMMN.defaults(MNIST)[0].merged({"space": "code"}), MNIST)
    assert model.autoencoder is not None
    sizes = [[(m.in_features, m.out_features) for m in part.modules() if isinstance(m, nn.Linear)]
             for part in (model.generator, model.autoencoder)]  # fmt: skip
    assert sizes[0] == [(10, 64), (64, 256), (256, 256), (256, 1024), (1024, 32)]
    assert sizes[1] == [(784, 1024), (1024, 32), (32, 1024), (1024, 784)]
    assert model.mmd.bandwidths == (1.0,)
    assert GMMN(GMMN.defaults(MNIST)[0], MNIST).mmd.bandwidths == (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimator": "unbiased"}, "give root: false"),
        ({"dropout": (0.1,)}, "each of the 2 encoder layers"),
        ({"bandwidths": (0.0, 1.0)}, "positive"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GMMN.Config.model_validate(given)


def test_refuses_codes_and_audio() -> None:
    with pytest.raises(DataMismatch, match="kind 'audio'"):
        GMMN(GMMN.Config(), DataSpec("audio", (16,), 256))


@pytest.mark.parametrize("check", VARIANT_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("model", [InCodes, Unbiased])
def test_contract_of_variants(check, model) -> None:  # type: ignore[no-untyped-def]
    check(model, SPECS["binary_vector"])


@pytest.mark.parametrize("model", [InCodes, Unbiased])
def test_two_ranks_equal_one(model: type[GMMN], two_ranks: TwoRanks) -> None:
    checks.two_ranks_equal_one(model, SPECS["grey_image"], two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("model", [InCodes, Unbiased])
@pytest.mark.parametrize("spec", ["real_vector", "grey_image"])
def test_variants_learn(model: type[GMMN], spec: str) -> None:
    checks.learns_its_tiny_problem(model, SPECS[spec])

"""What every model of two players must do: whose graph a turn builds, what it reaches, labels, data units."""

import pytest
import torch
from torch import Tensor, nn

from dgm_core.config import Strict
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.adversarial.ac_gan import ACGAN
from dgm_core.models.adversarial.base import AdversarialModel
from dgm_core.models.adversarial.cgan import CGAN
from dgm_core.models.adversarial.dcgan import DCGAN
from dgm_core.models.adversarial.gan import GAN
from dgm_core.models.adversarial.improved_gan import ImprovedGAN
from dgm_core.models.adversarial.wgan import WGAN
from tests.contract import checks
from tests.support import TwoRanks, examples, in_double

CLOCK = Clock(0, 10)
PLANE = DataSpec("vector", (2,), None, classes=2)
GREY = DataSpec("image", (1, 12, 8), 256, classes=2)
COLOUR = DataSpec("image", (3, 8, 8), None, classes=2)
LABELLED = (CGAN, ACGAN)
CASES = [(m, s) for m in (GAN, CGAN, ACGAN, DCGAN, ImprovedGAN, WGAN) for s in (PLANE, GREY, COLOUR)
         if not (m is DCGAN and s is PLANE)]  # fmt: skip


def build(model: type[AdversarialModel], spec: DataSpec, **overrides: object) -> AdversarialModel:
    torch.manual_seed(0)
    config, _ = model.tiny(spec)
    return model(config.merged(overrides), spec).double()


def data(spec: DataSpec, n: int) -> Batch:
    y = torch.arange(n) % spec.classes
    if spec.levels is None:
        return Batch(torch.randn(n, *spec.shape, dtype=torch.float64), y)
    return Batch(torch.randint(0, spec.levels, (n, *spec.shape)).to(spec.dtype), y)


@pytest.mark.parametrize(("model", "spec"), CASES)
def test_the_opponent_never_sees_the_generators_graph(model: type[AdversarialModel], spec: DataSpec) -> None:
    """With everything free to move, as no trainer would have it, its turns still leave the generator alone."""
    instance = build(model, spec)
    for turn in instance.turns():
        if turn.name != "generator":
            instance.loss(data(spec, 8), turn.name, CLOCK).value.backward()
    assert all(p.grad is None for p in instance.generator.parameters())


@pytest.mark.parametrize(("model", "spec"), CASES)
def test_a_turn_reaches_every_parameter_of_its_player(model: type[AdversarialModel], spec: DataSpec) -> None:
    """A gradient that is not zero arrives everywhere, over a few batches: dropout and ReLU may shut a path in one."""
    instance = build(model, spec).train()
    for turn in instance.turns():
        (player,) = turn.players
        instance.requires_grad_(False)
        mine = dict(instance.get_submodule(player).named_parameters())
        if player == "critic":
            del mine[[*mine][-1]]  # a constant added to a critic's scores cancels between data and samples
        reached = dict.fromkeys(mine, False)
        for p in mine.values():
            p.requires_grad_(True)
        for _ in range(3):
            instance.zero_grad()
            instance.loss(data(spec, 16), turn.name, CLOCK).value.backward()
            reached = {name: reached[name] or bool(p.grad.any()) for name, p in mine.items()}  # type: ignore[union-attr]
        assert all(reached.values()), [name for name, yes in reached.items() if not yes]


@pytest.mark.parametrize(("model", "spec"), CASES)
def test_samples_and_means_are_in_data_units(model: type[AdversarialModel], spec: DataSpec) -> None:
    instance = build(model, spec)
    for turn in instance.turns():
        instance.enter(turn.name, iter([data(spec, 20)]))
    instance.eval()
    with torch.no_grad():
        x, mean = instance.sample(9), instance.decode(instance.draw_latent(9))
    assert x.shape == mean.shape == (9, *spec.shape)
    assert x.dtype == spec.dtype
    if spec.levels is not None:
        assert 0 <= mean.min() <= mean.max() <= spec.levels - 1


@pytest.mark.parametrize("model", LABELLED)
@pytest.mark.parametrize("spec", [PLANE, GREY])
def test_labels_decide_what_is_made(model: type[AdversarialModel], spec: DataSpec) -> None:
    instance = build(model, spec).eval()
    with torch.no_grad():
        for p in instance.generator.parameters():
            p.mul_(2)  # so that integers differ, too
        z, first, second = instance.draw_latent(6), torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
        assert not torch.equal(instance.decode(z, first), instance.decode(z, second))
        mixed = instance.decode(z, torch.cat([first[:3], second[3:]]))
        # Rows of another batch: other kernels, other order of summation.
        torch.testing.assert_close(mixed[:3], instance.decode(z, first)[:3], rtol=0, atol=1e-9)
        torch.testing.assert_close(mixed[3:], instance.decode(z, second)[3:], rtol=0, atol=1e-9)
        torch.manual_seed(1)
        given = instance.sample(6, second)
        torch.manual_seed(1)
        expected = instance.to_data(instance.generate(instance.draw_latent(6), second))
        got = given.double() if spec.levels is None else given + 0.5
        # Real values are stored as float32; integers are rounded down from within their interval.
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0.5 if spec.levels else 1e-6)
    with pytest.raises(DataMismatch, match="labels lie in 0 … 1"):
        instance.sample(6, second + 1)
    with pytest.raises(DataMismatch, match="one label a sample"):
        instance.decode(z, second[:3])


@pytest.mark.parametrize("model", LABELLED)
def test_labels_are_drawn_from_the_training_marginals(model: type[AdversarialModel]) -> None:
    spec = DataSpec("vector", (2,), None, classes=3, class_shares=(0.0, 1.0, 0.0))
    instance = build(model, spec).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        drawn = instance.sample(5)
        torch.manual_seed(1)
        instance.draw_labels(5)
        again = instance.to_data(instance.generate(instance.draw_latent(5), torch.ones(5, dtype=torch.int64)))
    torch.testing.assert_close(drawn.double(), again, rtol=1e-6, atol=1e-6)  # stored as float32


@pytest.mark.parametrize("model", LABELLED)
def test_models_of_classes_need_labels(model: type[AdversarialModel]) -> None:
    spec = DataSpec("vector", (2,), None)
    with pytest.raises(DataMismatch, match="the data has no classes"):
        model(model.tiny(spec)[0], spec)
    with pytest.raises(DataMismatch, match="the batch has none"):
        build(model, PLANE).loss(Batch(data(PLANE, 4).x), "discriminator", CLOCK)


LABELLED_CHECKS = (
    checks.a_play_moves_only_its_players,
    checks.loss_is_finite,
    checks.evaluation_changes_no_state,
    checks.samples_look_like_data,
    checks.runs_on_meta,
    checks.resume_is_bitwise,
    checks.microbatches_equal_one_batch,
)


@pytest.mark.parametrize("model", LABELLED)
@pytest.mark.parametrize("check", LABELLED_CHECKS, ids=lambda f: f.__name__)
def test_contract_holds_on_labelled_vectors(check, model: type[AdversarialModel]) -> None:  # type: ignore[no-untyped-def]
    """The contract's own data has no vectors with labels."""
    check(model, PLANE)


@pytest.mark.parametrize("model", LABELLED)
def test_two_ranks_equal_one_on_labelled_vectors(model: type[AdversarialModel], two_ranks: TwoRanks) -> None:
    checks.two_ranks_equal_one(model, PLANE, two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("model", LABELLED)
def test_learns_labelled_vectors(model: type[AdversarialModel]) -> None:
    checks.learns_its_tiny_problem(model, PLANE)


@pytest.mark.parametrize("model", [ACGAN, DCGAN, ImprovedGAN, WGAN])
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (DataSpec("image", (1, 4, 12), 256, classes=2), "at least 8 × 8 pixels; given 4 × 12"),
        (DataSpec("audio", (16,), 256, classes=2), "kind 'audio'"),
    ],
)
def test_refuses_what_it_cannot_model(model: type[AdversarialModel], spec: DataSpec, message: str) -> None:
    with pytest.raises(DataMismatch, match=message):
        model(model.Config(), spec)


def test_dcgan_refuses_vectors() -> None:
    with pytest.raises(DataMismatch, match=r"makes images, with convolutions.*Use gan, improved_gan, wgan or wgan_gp"):
        DCGAN(DCGAN.Config(), PLANE)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (2, 12, 20), (1, 36, 8), (3, 64, 64)])
@pytest.mark.parametrize("model", [GAN, CGAN, ACGAN, DCGAN, ImprovedGAN, WGAN])
def test_images_of_every_size(model: type[AdversarialModel], shape: tuple[int, int, int]) -> None:
    spec = DataSpec("image", shape, 256, classes=3)
    with torch.device("meta"):
        instance = model(model.tiny(spec)[0], spec)
        batch = Batch(torch.zeros(4, *shape, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
        for turn in instance.turns():
            assert instance.loss(batch, turn.name, CLOCK).value.shape == ()
        assert instance.generate(instance.draw_latent(4), batch.y if instance.conditional else None).shape == (
            4,
            *shape,
        )


def score_apart(opponent: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([opponent(x[i : i + 1]) for i in range(len(x))])


@pytest.mark.parametrize("model", [GAN, WGAN])
def test_perceptrons_score_examples_apart(model: type[AdversarialModel]) -> None:
    instance = build(model, PLANE).eval()
    opponent = instance.get_submodule(instance.opponent)
    x = torch.randn(3, 2, dtype=torch.float64)
    # Another batch size is another order of summation.
    torch.testing.assert_close(opponent(x), score_apart(opponent, x), rtol=0, atol=1e-12)


def test_examples_of_support_are_labelled() -> None:
    """Guards the tests above: the labels say which kind of example it is."""
    batch = in_double(examples(PLANE, 50))
    assert batch.y is not None
    assert ((batch.x.mean(1) > 0) == (batch.y == 0)).all()


def test_configs_are_strict() -> None:
    assert all(issubclass(m.Config, Strict) for m, _ in CASES)

"""Glow: invertible at every level, with the density that its Jacobian says, and priors that a temperature reaches."""

import math

import pytest
import torch
from torch import Tensor

from dgm_core import distributed
from dgm_core.bijections import LUConvolution, NormalizedConvolution, PlainConvolution, SplitPrior
from dgm_core.config import Recipe
from dgm_core.contract import Batch, Clock, DataMismatch, DataSpec
from dgm_core.models.flow.glow import Glow
from tests.contract import checks
from tests.support import SPECS, TwoRanks, accepted

VARIANTS: dict[str, tuple[DataSpec, dict[str, object]]] = {
    "grey": (DataSpec("image", (1, 8, 8), 256), {}),
    "colour": (DataSpec("image", (3, 4, 8), 5), {"levels": 2, "permutation": "plain"}),
    "additive": (DataSpec("image", (1, 4, 4), 8), {"coupling": "additive", "permutation": "shuffle"}),
    "reversed": (DataSpec("image", (2, 2, 2), 4), {"permutation": "reverse"}),
    "labelled": (DataSpec("image", (1, 4, 4), 8, classes=3), {"conditional": True}),
    "logit": (DataSpec("image", (1, 4, 4), 8), {"alpha": 0.05}),
    "variational": (DataSpec("image", (1, 4, 4), 8), {"dequantization": "variational"}),
    "real": (DataSpec("image", (2, 4, 4), None), {"memory": "checkpoint"}),
    "reconstructed": (DataSpec("image", (1, 4, 4), 8, classes=3), {"conditional": True, "memory": "invertible"}),
}
# Exact algebra in float64, through some twenty maps whose scales differ by a factor of ten at most.
EXACT = {"rtol": 0, "atol": 1e-8}


def build(name: str, **more: object) -> Glow:
    spec, overrides = VARIANTS[name]
    torch.manual_seed(0)
    config, _ = Glow.tiny(spec)
    return Glow(config.merged({"depth": 2, "features": 8, **overrides, **more}), spec).double()


def perturbed(name: str, **more: object) -> Glow:
    """Started on data, then moved away from where training starts."""
    model = build(name, **more).eval()
    with torch.no_grad():
        model.enter("model", iter([data(model.data, 40)]))
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def data(spec: DataSpec, n: int) -> Batch:
    torch.manual_seed(n)
    y = torch.randint(0, spec.classes, (n,)) if spec.classes else None
    if spec.levels is None:
        return Batch(1 + 2 * torch.randn(n, *spec.shape, dtype=torch.float64), y)
    return Batch(torch.randint(0, spec.levels, (n, *spec.shape)).to(spec.dtype), y)


@pytest.mark.parametrize("name", VARIANTS)
def test_inverse(name: str) -> None:
    model = perturbed(name)
    batch = data(model.data, 4)
    label = model.context_of(batch.y)
    with torch.no_grad():
        assert model.inverse_error(batch.x, batch.y).max() < EXACT["atol"]
        z = model.draw_latent(4)
        torch.testing.assert_close(model._normalize(model._invert(z, label), label)[0], z, **EXACT)


@pytest.mark.parametrize("name", VARIANTS)
def test_log_prob_is_the_density_of_the_jacobian(name: str) -> None:
    """log N(f(x); 0, I) + log |det ∂f/∂x| − log q(u | x), with the whole way from data units to the latent in f."""
    model = perturbed(name)
    batch = data(model.data, 2)
    label = model.context_of(batch.y)
    torch.manual_seed(3)
    found = model.log_prob(batch.x, batch.y)
    torch.manual_seed(3)
    stored, log_q = model._dequantize(batch.x)
    for i in range(2):
        given = None if label is None else label[i : i + 1]
        jacobian = torch.autograd.functional.jacobian(
            lambda flat, given=given: model._normalize(flat.reshape(1, *model.data.shape), given)[0][0],
            stored[i].detach().flatten(),
        )
        z = model._normalize(stored[i : i + 1], given)[0]
        base = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        torch.testing.assert_close(found[i], base + torch.linalg.slogdet(jacobian)[1] - log_q[i], **EXACT)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = perturbed(name).train()
    model.loss(data(model.data, 32), "model", Clock(0, 10)).value.backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", ["grey", "variational", "labelled"])
@pytest.mark.parametrize("memory", ["checkpoint", "invertible"])
def test_memory_does_not_change_the_gradient(name: str, memory: str) -> None:
    """Of the whole model: its levels, its priors, its noise."""

    def gradients(memory: str) -> dict[str, Tensor]:
        model = perturbed(name, memory=memory, depth=4).train()
        torch.manual_seed(5)
        model.loss(data(model.data, 8), "model", Clock(0, 10)).value.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients("store"), gradients(memory)
    assert expected.keys() == found.keys()
    for parameter_name, gradient in expected.items():
        # 1e-8 of the largest gradient: nats of some hundred coordinates are of that size.
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[parameter_name], gradient, rtol=0, atol=1e-8 * scale, msg=parameter_name)


class Reconstructed(Glow):
    """Test-only: the contract's checks build `tiny`."""

    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Glow.Config, Recipe]:
        config, recipe = Glow.tiny(data)
        return config.merged({"memory": "invertible"}), recipe


class Checkpointed(Glow):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Glow.Config, Recipe]:
        config, recipe = Glow.tiny(data)
        return config.merged({"memory": "checkpoint"}), recipe


class Noisy(Glow):
    @classmethod
    def tiny(cls, data: DataSpec) -> tuple[Glow.Config, Recipe]:
        config, recipe = Glow.tiny(data)
        more = {"dequantization": "variational", "conditional": data.classes > 0, "memory": "invertible"}
        return config.merged(more), recipe


@pytest.mark.parametrize("model", [Reconstructed, Checkpointed, Noisy])
def test_every_memory_and_noise_keeps_the_contract(model: type[Glow], two_ranks: TwoRanks) -> None:
    spec = SPECS["grey_image"]
    checks.two_ranks_equal_one(model, spec, two_ranks)
    checks.microbatches_equal_one_batch(model, spec)
    checks.runs_on_meta(model, spec)


def test_learnt_noise_keeps_the_contract() -> None:
    spec = SPECS["grey_image"]
    checks.resume_is_bitwise(Noisy, spec)
    checks.evaluation_changes_no_state(Noisy, spec)
    checks.samples_look_like_data(Noisy, spec)
    checks.probabilities_sum_to_one(Noisy, checks.ENUMERABLE["tiny_colour_image"])


def test_entering_whitens_every_layer_on_the_first_batches() -> None:
    """Mean 0 and variance 1 of each channel after every step's activation normalisation, over 256 images together."""
    model = build("colour").train()
    batches = [data(model.data, n) for n in (100, 100, 60, 70)]
    inputs: dict[NormalizedConvolution, Tensor] = {}
    for module in model.modules():
        if isinstance(module, NormalizedConvolution):
            module.register_forward_hook(lambda part, x, _: inputs.update({part: x[0]}))
    with torch.no_grad():
        model.enter("model", iter(batches))
    assert len(inputs) == 4
    for part, x in inputs.items():
        assert x.shape[0] == 260  # the fourth batch is not needed
        out, _ = part.norm(x)
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]).double(), **EXACT)
        torch.testing.assert_close(out.var((0, 2, 3), correction=0), torch.ones(out.shape[1]).double(), **EXACT)
    started = [v for k, v in model.state_dict().items() if k.endswith("started")]
    assert len(started) == 4 * 3  # two levels of two steps: each its own, and two in the coupling's network
    assert all(started)


def entered(name: str) -> dict[str, Tensor]:
    """Rank 0 holds every example of a data set that is too small for two."""
    model = build(name)
    torch.manual_seed(4)
    model.enter("model", iter([] if distributed.rank() else [data(model.data, 3)]))
    return {k: v.detach() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", ["grey", "labelled", "variational"])
def test_a_rank_without_examples_can_enter(name: str, two_ranks: TwoRanks) -> None:
    one = entered(name)
    for two in two_ranks.run(entered, name):
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, **EXACT, msg=key)


def test_entering_again_changes_nothing() -> None:
    """A warm start brings layers that have started."""
    model = build("variational")
    with torch.no_grad():
        model.enter("model", iter([data(model.data, 20)]))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.enter("model", iter([data(model.data, 30)]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_real_valued_images_are_standardised_and_then_started() -> None:
    model = build("real")
    batches = [data(model.data, n) for n in (20, 21, 22, 23, 24)]
    with torch.no_grad():
        model.enter("model", iter(batches))
    x = torch.cat([batch.x for batch in batches])
    torch.testing.assert_close(model.to_real(x)[0].mean((0, 2, 3)), torch.zeros(2).double(), **EXACT)


def test_integers_are_scaled_to_half_around_zero() -> None:
    model = build("grey")
    x = torch.tensor([0.0, 255.0, 256.0], dtype=torch.float64).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    real, log_det = model.to_real(x)
    assert real[:, 0, 0, 0].tolist() == pytest.approx([-0.5, 255 / 256 - 0.5, 0.5])
    torch.testing.assert_close(log_det, torch.full((3,), -64 * math.log(256), dtype=torch.float64), **EXACT)


def test_loss_is_bits_of_the_bound() -> None:
    model = perturbed("variational")
    batch = data(model.data, 8)
    torch.manual_seed(2)
    loss = model.loss(batch, "model", Clock(0, 10))
    torch.manual_seed(2)
    nats = -model.log_prob(batch.x).mean()
    torch.testing.assert_close(loss.value, nats, **EXACT)
    torch.testing.assert_close(loss.metrics["bits_per_dim"], nats.detach() / (16 * math.log(2)), **EXACT)


def test_temperature_reaches_every_level() -> None:
    """At temperature 0 a sample is the mode of every prior, the top's and those of what was split off."""
    model = perturbed("grey")
    splits = [m for m in model.modules() if isinstance(m, SplitPrior)]
    assert len(splits) == 1
    with torch.no_grad():
        cold = model.sample(3, temperature=0.0)
        assert torch.equal(cold, cold[:1].expand_as(cold))
        real = model.flow.inverse(torch.zeros(1, 64, dtype=torch.float64))[0]
        z, _ = model.flow(real)
        torch.testing.assert_close(z, torch.zeros_like(z), **EXACT)
        warm, hot = (model._invert(t * model.draw_latent(200)).var(0).sum() for t in (0.5, 1.0))
        assert warm < 0.5 * hot
        x = model.sample(20)
    assert x.dtype == torch.uint8
    assert x.shape == (20, 1, 8, 8)


def test_labels_decide_the_top_prior_alone() -> None:
    """log p(x | y) differs by the prior of the top's 4 coordinates in 16, and samples of one noise by the label."""
    model = perturbed("labelled")
    batch = data(model.data, 6)
    with torch.no_grad():
        x, _ = model._dequantize(batch.x)
        z = [model._normalize(x, model.context_of(torch.full((6,), k)))[0] for k in range(3)]
        assert torch.equal(z[0][:, 8:], z[1][:, 8:])  # what was split off
        assert ((z[0] - z[1])[:, :8].abs() > 1e-6).all()
        noise = torch.zeros(1, 16, dtype=torch.float64)
        decoded = [model.decode(noise, torch.tensor([k])) for k in range(3)]
    assert (decoded[0] - decoded[1]).abs().max() > 1e-6
    with pytest.raises(DataMismatch, match="class-conditional"):
        model.log_prob(batch.x)


def test_latent_lists_coarse_levels_first() -> None:
    """Before anything is learnt or started, channels are only rotated within a pixel's square, so that the norm of
    what a 4 × 4 block of pixels holds is kept: the top's and the split's together."""
    model = build("grey", coupling="additive", depth=1)
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x[0, 0, :4, :4] = torch.randn(4, 4, dtype=torch.float64)
    z = model.flow(x)[0][0]
    torch.testing.assert_close(z.norm(), x.norm(), rtol=1e-5, atol=0)  # rotations are drawn in float32
    top, split = z[:32].reshape(8, 2, 2), z[32:].reshape(2, 4, 4)
    assert top[:, 0, 0].norm() > 0
    assert top[:, 0, 1].norm() == top[:, 1].norm() == 0
    assert split[:, :2, :2].norm() > 0
    assert split[:, 2:].norm() == split[:, :, 2:].norm() == 0


@pytest.mark.parametrize(
    ("permutation", "kind"), [("lu", LUConvolution), ("plain", PlainConvolution), ("shuffle", None), ("reverse", None)]
)
def test_permutation_is_what_is_asked_for(permutation: str, kind: type | None) -> None:
    model = build("grey", permutation=permutation)
    learnt = [m for m in model.modules() if isinstance(m, LUConvolution | PlainConvolution)]
    assert len(learnt) == (4 if kind else 0)
    assert all(type(m) is kind for m in learnt)


def test_lu_and_plain_are_the_same_model() -> None:
    """With the products of the factors for matrices, the density is the same."""
    lu, plain = perturbed("grey"), build("grey", permutation="plain").eval()
    state = {k: v for k, v in lu.state_dict().items() if k in plain.state_dict()}
    for name, module in lu.named_modules():
        if isinstance(module, LUConvolution):
            state[f"{name}.weight"] = module.matrix()[0].detach()
    plain.load_state_dict(state)
    x = data(lu.data, 4).x
    found = []
    for model in (lu, plain):
        torch.manual_seed(1)
        found.append(model.log_prob(x))
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_learnt_noise_starts_uniform() -> None:
    """Its couplings start as the identity: the bound is then that of uniform noise."""
    learnt = build("variational")
    plain = Glow(learnt.config.merged({"dequantization": "uniform"}), learnt.data).double()
    plain.load_state_dict({k: v for k, v in learnt.state_dict().items() if k in plain.state_dict()})
    x = data(learnt.data, 5).x
    found = []
    for model in (learnt, plain):
        torch.manual_seed(1)
        found.append(model.log_prob(x))
    torch.testing.assert_close(found[0], found[1], **EXACT)


def test_paper_sizes() -> None:
    """CIFAR-10's: 3 levels of 32 steps with 512 features; 28 × 28 allows two levels."""
    with torch.device("meta"):
        config, recipe = Glow.defaults(DataSpec("image", (3, 32, 32), 256))
        model = Glow(config, DataSpec("image", (3, 32, 32), 256))
    assert (config.levels, config.depth, config.features) == (3, 32, 512)
    filters = sum(9 * c // 2 * 512 + 512 * 512 + 9 * 512 * c for c in (12, 24, 48)) * 32
    # Besides the filters: 1 × 1 convolutions, normalisation, priors.
    assert filters < sum(p.numel() for p in model.parameters()) < 1.02 * filters
    assert recipe.batch_size == 512
    assert Glow.defaults(DataSpec("image", (1, 28, 28), 256))[0].levels == 2


@pytest.mark.parametrize(
    ("spec", "overrides", "message"),
    [
        (DataSpec("vector", (4,), None), {}, "kind 'vector'"),
        (DataSpec("codes", (4, 4), 8), {}, "kind 'codes'"),
        (DataSpec("image", (1, 28, 28), 256), {"levels": 3}, "at most 2"),
        (DataSpec("image", (1, 2, 3), 256), {"levels": 1}, "at most 0"),
        (DataSpec("image", (1, 4, 4), None), {"levels": 1, "dequantization": "variational"}, "real-valued"),
        (DataSpec("image", (1, 4, 4), None), {"levels": 1, "alpha": 0.05}, "real-valued"),
        (DataSpec("image", (1, 4, 4), 8), {"levels": 1, "conditional": True}, "has none"),
    ],
)
def test_refuses_what_it_cannot_model(spec: DataSpec, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(DataMismatch, match=message):
        Glow(Glow.Config.model_validate({"depth": 1, "features": 4, **overrides}), spec)


def test_accepts_images_alone() -> None:
    assert accepted(Glow) == ["binary_image", "grey_image"]

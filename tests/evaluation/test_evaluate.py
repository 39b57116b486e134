"""The whole: what is measured of whom, repeatably and without a trace."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgm_core.contract import Batch, DataMismatch, DataSpec
from dgm_core.evaluation.evaluate import evaluate
from dgm_core.evaluation.judge import Judge, fit_judge
from dgm_core.evaluation.record import Evaluation, EvaluationConfig, Metric
from dgm_core.evaluation.sampling import goes_by_labels
from dgm_core.evaluation.validation import validate
from dgm_core.models.latent.ppca import PPCA
from tests.evaluation.handmade import IMAGES, Blank, Everything, factory, images

INFO = {"name": "halves", "variant": "plain", "transforms": []}
SMALL = EvaluationConfig(examples=80, samples=90, importance_samples=4, tiles=3)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    torch.manual_seed(0)
    return {"train": factory(images(300)), "val": factory(images(60)), "test": factory(images(100))}


@pytest.fixture(scope="module")
def judge(data: dict[str, Any]) -> Judge:
    return fit_judge(IMAGES, data["train"], seed=0, steps=60, held_out=data["test"])


def run(model: Any, data: dict[str, Any], out: Path, judge: Judge | None = None, **changes: Any) -> Evaluation:
    given = {"spec": model.data, "info": INFO, "options": SMALL, "seed": 3, **changes}
    return evaluate(model, judge=judge, out=out, **data, **given)


def test_everything_is_measured_and_said(data: dict[str, Any], judge: Judge, tmp_path: Path):
    found = run(Everything(), data, tmp_path, judge, ema=True)
    assert set(found.metrics) == {
        *("elbo_nats", "bits_per_dim", "nll_is4_nats", "seconds_per_sample"),
        *("frechet", "frechet_means", "kid", "precision", "recall", "density", "coverage"),
        *("class_balance_tv", "class_agreement", "nearest_train_ratio"),
        *("codes/top/usage", "codes/top/perplexity", "codes/top/entropy_bits", "codes/reduction"),
        *("kl_nats", "active_units", "mutual_information_nats", "reconstruction_mse", "reconstruction_agreement"),
        "exchanged_latent_rise",
    }
    for name, metric in found.metrics.items():
        assert metric.value is not None, name
        wanted = {"data": "halves", "variant": "plain", "split": "test", "seed": 3, "ema": True}
        assert wanted.items() <= metric.context.items(), name
    assert found.metrics["frechet"].context["n"] == 90
    assert found.metrics["frechet"].context["n_real"] == 80
    for name in ("frechet", "kid", "precision", "recall", "class_agreement", "reconstruction_agreement"):
        assert found.metrics[name].floor is not None, name
    assert found.metrics["class_agreement"].value == pytest.approx(1)  # its halves are the classes
    files = {f.file for f in found.figures}
    assert files == {
        *("real.png", "reconstructed.png", "samples.png", "sample_means.png", "samples_by_class.png"),
        *("interpolations.png", "interpolations.gif", "traversals.png", "kl.png", "code_usage.png", "neighbours.png"),
        "latent_map.png",
    }
    assert files | {"evaluation.json"} == {p.name for p in tmp_path.iterdir()}
    assert all(f.caption for f in found.figures)
    assert found.environment["torch"] == torch.__version__
    assert Evaluation.read(tmp_path).flat() == found.flat()
    assert found.flat()["frechet"] == found.metrics["frechet"].value


def test_repeats_itself_and_leaves_no_trace(data: dict[str, Any], judge: Judge, tmp_path: Path):
    model = Everything()
    model.train()
    model.dropout.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(11)
    expected = torch.rand(5)
    torch.manual_seed(11)
    first = run(model, data, tmp_path / "a", judge)
    assert torch.equal(torch.rand(5), expected)
    assert model.training
    assert not model.dropout.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    second = run(model, data, tmp_path / "b", judge)
    first.metrics.pop("seconds_per_sample")
    second.metrics.pop("seconds_per_sample")
    assert first == second
    for figure in first.figures:
        assert (tmp_path / "a" / figure.file).read_bytes() == (tmp_path / "b" / figure.file).read_bytes(), figure
    other = run(model, data, tmp_path / "c", judge, seed=4)
    assert other.metrics["frechet"].value != first.metrics["frechet"].value


def test_one_option_does_not_move_anothers_numbers(data: dict[str, Any], judge: Judge, tmp_path: Path):
    whole = run(Everything(), data, tmp_path, judge)
    without = SMALL.merged({"importance_samples": 0, "figures": False, "elbo_draws": 1})
    fewer = run(Everything(), data, tmp_path, judge, options=without)
    assert "nll_is4_nats" not in fewer.metrics
    assert fewer.metrics["frechet"].value == whole.metrics["frechet"].value
    assert fewer.metrics["mutual_information_nats"].value == whole.metrics["mutual_information_nats"].value
    # Figures of the earlier evaluation that nobody made again are gone.
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_the_split_is_a_choice(data: dict[str, Any], tmp_path: Path):
    found = run(Everything(), data, tmp_path, options=SMALL.merged({"split": "val", "figures": False}))
    assert found.metrics["kl_nats"].context["split"] == "val"
    assert found.metrics["kl_nats"].context["n"] == 60


def test_a_plain_sampler_without_a_judge(data: dict[str, Any], tmp_path: Path):
    class Sampler(Blank):
        def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
            return torch.randint(0, 256, (n, 1, 4, 4)).to(torch.uint8)

    found = run(Sampler(), data, tmp_path)
    assert set(found.metrics) == {"seconds_per_sample", "nearest_train_ratio"}
    assert {f.file for f in found.figures} == {"real.png", "samples.png", "neighbours.png"}


def test_copying_the_training_split_is_noticed(data: dict[str, Any], tmp_path: Path):
    train = images(300)

    class Copy(Blank):
        def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
            return train.x[torch.randint(0, 300, (n,))]

    found = run(Copy(), {**data, "train": factory(train)}, tmp_path)
    assert found.metrics["nearest_train_ratio"].value == 0
    assert any("by heart" in w for w in found.warnings)


def test_samples_that_are_not_finite_are_said_and_left_out(tmp_path: Path):
    spec = DataSpec("vector", (2,), None)
    points = {k: factory(Batch(torch.randn(100, 2))) for k in ("train", "val", "test")}

    class Broken(Blank):
        def __init__(self, good: int) -> None:
            super().__init__(spec)
            self.good = good

        def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
            x = torch.randn(n, 2)
            x[self.good :] = math.nan
            return x

    some = run(Broken(50), points, tmp_path)
    assert some.metrics["energy_distance"].context["n"] == 50
    assert any("40 of 90 samples are NaN" in w for w in some.warnings)
    none = run(Broken(0), points, tmp_path)
    assert set(none.metrics) == {"seconds_per_sample"}


def test_a_number_that_is_not_finite_is_null_and_said(data: dict[str, Any], tmp_path: Path):
    class Lost(Everything):
        def log_prob(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return torch.full((x.shape[0],), math.nan)

    found = run(Lost(), data, tmp_path, options=SMALL.merged({"figures": False}))
    assert json.loads((tmp_path / "evaluation.json").read_text())["metrics"]["elbo_nats"]["value"] is None
    assert "elbo_nats" not in found.flat()
    assert any(w.startswith("elbo_nats is NaN") for w in found.warnings)
    assert math.isnan(validate(Lost(), data["val"](), IMAGES, INFO)["val/elbo_nats"])


def test_modes_of_a_known_mixture(tmp_path: Path):
    """A model of two of three modes, on standardised data: the modes are named in the units of before."""
    modes, sd, scale = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]), 0.5, 5.0

    def draw(n: int, count: int) -> Tensor:
        return (modes[torch.randint(0, count, (n,))] + sd * torch.randn(n, 2) - 3) / scale

    class Two(Blank):
        def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
            return draw(n, 2)

    spec = DataSpec("vector", (2,), None)
    info = {
        **INFO,
        "density": {"modes": modes.tolist(), "sd": sd},
        "transforms": [{"name": "standardize", "mean": [3.0, 3.0], "sd": [scale, scale]}],
    }
    points = {k: factory(Batch(draw(500, 3))) for k in ("train", "val", "test")}
    found = run(Two(spec), points, tmp_path, info=info)
    assert found.metrics["modes_found"].value == 2
    assert found.metrics["modes_found"].floor == 3
    assert found.metrics["good_samples"].value == pytest.approx(
        1 - math.exp(-4.5), abs=0.04
    )  # within 3 sd on the plane
    assert any("1 of the 3 modes" in w for w in found.warnings)
    assert found.metrics["energy_distance"].value > 10 * abs(found.metrics["energy_distance"].floor or 0)
    assert [f.file for f in found.figures] == ["density.png"]


def test_missing_classes_are_said(data: dict[str, Any], judge: Judge, tmp_path: Path):
    class One(Everything):
        def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
            return super().sample(n, torch.zeros(n, dtype=torch.int64))

    found = run(One(), data, tmp_path, judge)
    assert any("class 1" in w for w in found.warnings)
    assert found.metrics["class_balance_tv"].value == pytest.approx(0.5)
    assert "class_agreement" not in found.metrics  # labels change nothing


def test_labels_are_found_out_by_their_effect():
    class Refusing(Blank):
        def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
            if y is not None:
                raise DataMismatch("this model has no labels")
            return torch.rand(n, 1, 4, 4)

    class Contextual(Blank):
        def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
            return context["top"] + self.labels_for(n, y)[:, None]

    batch = images(10)._replace(context={"top": torch.rand(10, 3)})
    assert goes_by_labels(Everything().eval(), batch, {}, 0)
    assert goes_by_labels(Contextual(), batch, {}, 0)
    assert not goes_by_labels(Blank(), batch, {}, 0)
    assert not goes_by_labels(Refusing(), batch, {}, 0)


def test_a_prior_over_codes_gets_contexts_and_a_baseline(tmp_path: Path):
    top = DataSpec("codes", (2,), 4)
    spec = DataSpec("codes", (2, 2), 4, classes=2, context={"top": top})

    def codes(n: int) -> Batch:
        context = torch.randint(0, 4, (n, 2)).to(torch.uint8)
        return Batch(context[:, :, None].expand(-1, -1, 2).contiguous(), torch.arange(n) % 2, {"top": context})

    class Prior(Blank):
        def sample(self, n: int, y: Tensor | None = None, context: Mapping[str, Tensor] = {}) -> Tensor:
            assert context["top"].shape == (n, 2)
            return context["top"][:, :, None].expand(-1, -1, 2).contiguous()

    found = run(Prior(spec), {k: factory(codes(200)) for k in ("train", "val", "test")}, tmp_path)
    # Codes are drawn equally often: two bits each, and what the finite histograms lose.
    assert found.metrics["marginal_bits_per_dim"].value == pytest.approx(2, abs=0.05)
    assert "samples.png" in {f.file for f in found.figures}


def test_a_judge_of_other_data_is_refused(data: dict[str, Any], judge: Judge, tmp_path: Path):
    with pytest.raises(DataMismatch, match="was trained on"):
        run(Everything(DataSpec("image", (1, 4, 4), 2, 2)), data, tmp_path, judge)
    assert not list(tmp_path.iterdir())


def test_ppca_from_end_to_end(tmp_path: Path):
    spec = DataSpec("vector", (2,), None)
    cloud = torch.randn(400, 2) @ torch.tensor([[2.0, 1.0], [0.0, 0.3]])
    points = {k: factory(Batch(cloud)) for k in ("train", "val", "test")}
    model = PPCA(PPCA.Config(latents=1), spec)
    model.enter("closed_form", points["train"]())
    coordinates = fit_judge(spec, points["train"], seed=0)
    found = run(model, points, tmp_path, coordinates, info={**INFO, "density": {"entropy": 2.0}})
    assert found.metrics["nll_nats"].floor == 2.0
    assert found.metrics["frechet"].value < 0.1  # of a Gaussian fitted to these points: what 90 samples make of it
    assert "standardised coordinates" in found.metrics["frechet"].context["features"]
    assert {f.file for f in found.figures} == {"density.png", "kl.png"}  # one latent has no map on the plane


def test_validate_names_what_a_recipe_may_monitor(data: dict[str, Any], judge: Judge):
    model = Everything()
    model.train()
    torch.manual_seed(2)
    expected = torch.rand(2)
    torch.manual_seed(2)
    found = validate(model, data["val"](), IMAGES, INFO, judge=judge)
    assert torch.equal(torch.rand(2), expected)
    assert model.training
    assert {"val/elbo_nats", "val/bits_per_dim", "val/reconstruction_mse", "val/kl_nats", "val/frechet"} <= set(found)
    assert found == validate(model, data["val"](), IMAGES, INFO, judge=judge)
    assert "val/frechet" not in validate(model, data["val"](), IMAGES, INFO)
    spec = DataSpec("vector", (2,), None)
    points = factory(Batch(torch.randn(50, 2)))
    vector = validate(PPCA(PPCA.Config(latents=1), spec), points(), spec, INFO)
    assert {"val/nll_nats", "val/energy_distance"} <= set(vector)


def test_metrics_hold_no_infinities():
    assert Metric.of(math.inf, math.nan, -math.inf) == Metric(None, {}, None, None)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="did you mean 'samples'"):
        EvaluationConfig.model_validate({"sample": 3})

"""One model's evaluation: everything its capabilities allow, with context, floors, figures and warnings in words."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dgm_core.capabilities import HasCodes, HasDecoder, HasPosterior
from dgm_core.contract import Batch, DataSpec, GenerativeModel
from dgm_core.data.display import undo
from dgm_core.evaluation import figures, quality
from dgm_core.evaluation.codes import code_metrics, encode, marginal_metric
from dgm_core.evaluation.drawing import Display
from dgm_core.evaluation.energies import energy_metrics
from dgm_core.evaluation.examples import Batches, nearest_stored, quiet, seeded, take, unit
from dgm_core.evaluation.inverses import inverse_metrics
from dgm_core.evaluation.judge import Judge
from dgm_core.evaluation.latents import can_reconstruct, latent_metrics, reconstruct, reconstruction_metrics
from dgm_core.evaluation.likelihood import likelihood
from dgm_core.evaluation.record import Evaluation, EvaluationConfig, Figure, Metric
from dgm_core.evaluation.sampling import Drawn, draw, draw_means, goes_by_labels
from dgm_core.evaluation.sounds import beside_each_other

TRAINING_EXAMPLES = 20_000  # searched for nearest neighbours
QUERIES = 64  # samples whose nearest neighbours are looked for
CLASSES_SHOWN = 20
ROWS_OF_A_TEMPERATURE = 3
Progress = Callable[[int, int, str], None]


def evaluate(
    model: GenerativeModel,
    *,
    spec: DataSpec,
    info: Mapping[str, Any],
    judge: Judge | None,
    train: Batches,
    val: Batches,
    test: Batches,
    options: EvaluationConfig,
    out: Path,
    seed: int,
    ema: bool = False,
    display: Display | None = None,
    drawn: Drawn | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a trained model and write `evaluation.json` and its PNG figures to `out`.

    Args:
        info: the data set's `name`, `variant`, `transforms`, `original`, `density` (`entropy`, `modes`, `sd`).
        judge: of this very data set; without one nothing is measured on features.
        train, val, test: each call gives a fresh pass over the split.
        ema: whether `model` holds averaged parameters; said in every metric's context.
        display: stored data (or means in its units) to uint8 pictures (B, C, H, W), or to waveforms (B, T).
        drawn: `options.samples` samples that were drawn elsewhere; without them they are drawn here.
        progress: told (done, total, what) as the work goes on.

    The same arguments give the same numbers and bytes (but for `seconds_per_sample`); neither the model nor the random
    stream is moved. `evaluation.json` is written last: where it stands, all figures do.
    """
    if judge is not None:
        judge.check(spec)
    with quiet(model, seed):
        work = _Work(model, spec, info, judge, options, seed, ema, display, drawn, progress)
        result = work.run(train, val if options.split == "val" else test)
    result.write(out, work.images)
    return result


class _Work:
    """The steps, each in a random stream of its own: one option does not move another's numbers."""

    def __init__(
        self,
        model: GenerativeModel,
        spec: DataSpec,
        info: Mapping[str, Any],
        judge: Judge | None,
        options: EvaluationConfig,
        seed: int,
        ema: bool,
        display: Display | None,
        drawn: Drawn | None,
        progress: Progress | None,
    ) -> None:
        self.model, self.spec, self.info, self.judge, self.options = model, spec, info, judge, options
        self.seed, self.display, self.given, self.progress = seed, display, drawn, progress
        self.result = Evaluation(environment=_environment(model))
        self.images: dict[str, bytes] = {}
        self.base = {
            "data": info.get("name", ""),
            "variant": info.get("variant", "plain"),
            "split": options.split,
            "seed": seed,
            "ema": ema,
        }

    def run(self, train: Batches, scored: Batches) -> Evaluation:
        steps = [self._likelihood, self._samples, self._quality, self._codes, self._latents, self._reconstructions]
        steps += [self._energy, self._inverse, self._neighbours]
        steps += [self._pictures, self._sounds] if self.options.figures else []
        self.test = take(scored(), self.options.examples)
        self.train = take(train(), TRAINING_EXAMPLES)
        for i, step in enumerate(steps):
            if self.progress is not None:
                self.progress(i, len(steps), step.__name__.strip("_"))
            torch.manual_seed(self.seed)
            step()
        if self.progress is not None:
            self.progress(len(steps), len(steps), "done")
        for name, metric in self.result.metrics.items():
            if metric.value is None:
                self.result.warnings.append(f"{name} is NaN or infinite, so it is left out of the metrics.")
        return self.result

    def add(self, metrics: Mapping[str, Metric]) -> None:
        self.result.metrics |= {name: metric.within(self.base) for name, metric in metrics.items()}

    def show(self, file: str, drawing: tuple[bytes, str] | None) -> None:
        if drawing is not None:
            self.images[file] = drawing[0]
            self.result.figures.append(Figure(file, drawing[1]))

    def _likelihood(self) -> None:
        self.add(likelihood(self.model, self.test, self.spec, self.info, self.options))
        if self.spec.kind == "codes":
            self.add({"marginal_bits_per_dim": marginal_metric(self.train.x, self.test.x, self.spec)})

    def _samples(self) -> None:
        o = self.options
        self.by_labels = goes_by_labels(self.model, self.test, o.sampling, self.seed)
        drawn = self.given or draw(
            self.model, o.samples, self.test, o.sampling, o.batch_size, by_labels=self.by_labels, progress=self.progress
        )
        context = {"n": o.samples, "sampling": dict(o.sampling), "batch_size": o.batch_size}
        self.add({"seconds_per_sample": Metric.of(drawn.seconds / o.samples, **context)})
        finite = torch.isfinite(drawn.x.double()).flatten(1).all(1)
        if not finite.all():
            self.result.warnings.append(f"{int((~finite).sum())} of {len(finite)} samples are NaN or infinite.")
        self.drawn = Drawn(drawn.x[finite], None if drawn.y is None else drawn.y[finite], drawn.seconds)
        # Enough for every statistic below; a model with fewer good samples has nothing worth measuring.
        self.enough = int(finite.sum()) > o.neighbours + 1
        self.means = None
        if isinstance(self.model, HasPosterior) and isinstance(self.model, HasDecoder):
            self.means = draw_means(self.model, o.samples, self.test, o.batch_size, by_labels=self.by_labels)
        if self.enough and len(drawn.x[finite].unique(dim=0)) < 0.1 * len(self.test.x[: o.samples].unique(dim=0)):
            self.result.warnings.append("The samples have collapsed: most of them are copies of a few.")

    def _quality(self) -> None:
        if not self.enough:
            return
        o, n = self.options, len(self.drawn.x)
        reference = take(iter([self.train]), n)  # as many as samples, so that both have the same bias
        context = {"n": n, "n_real": len(self.test.x), "sampling": dict(o.sampling)}
        if self.judge is not None:
            feature = "judge" if self.judge.kind == "classes" else "standardised coordinates"
            context["features"] = f"{feature} ({self.judge.size})"
            fake, real, floor = (self.judge.features(x) for x in (self.drawn.x, self.test.x, reference.x))
            self.add(_distances(fake, real, floor, o, context))
            if self.means is not None:
                found = quality.frechet(self.judge.features(nearest_stored(self.means, self.spec)), real)
                plain = {**context, "of": "decoded means of prior draws"}
                self.add({"frechet_means": Metric.of(found, quality.frechet(floor, real), **plain)})
            if self.judge.kind == "classes":
                self._classes(self.judge, context)
        if self.spec.kind == "vector":
            self._vectors(reference.x, context)

    def _classes(self, judge: Judge, context: dict[str, Any]) -> None:
        found, n = judge.classify(self.drawn.x), len(self.drawn.x)
        shares = torch.tensor(self.spec.class_shares or (1 / self.spec.classes,) * self.spec.classes)
        alike = quality.class_balance(judge.classify(self.test.x), shares)
        self.add({"class_balance_tv": Metric.of(quality.class_balance(found, shares), alike, **context)})
        if self.by_labels and self.drawn.y is not None:
            agree = (found == self.drawn.y).double()
            error = (agree.std() / math.sqrt(n)).item()
            self.add({"class_agreement": Metric.of(agree.mean().item(), judge.accuracy, error, **context)})
        counts = torch.bincount(found, minlength=self.spec.classes)
        missing = [str(c) for c in range(self.spec.classes) if counts[c] == 0 and shares[c] * n >= 10]
        if missing:
            self.result.warnings.append(f"No sample was recognised as class {', '.join(missing)}: modes are missing.")

    def _vectors(self, reference: Tensor, context: dict[str, Any]) -> None:
        real = unit(self.test.x, self.spec).double()
        scale = real.std(0).clamp_min(1e-12)
        fake, real, floor = (unit(x, self.spec).double() / scale for x in (self.drawn.x, self.test.x, reference))
        chunk, width = self.options.chunk, quality.median_distance(real)
        kernel = quality.gaussian(width)
        value, error = quality.energy_distance(fake, real, chunk)
        plain = {**context, "features": "coordinates over their standard deviations"}
        self.add({"energy_distance": Metric.of(value, quality.energy_distance(floor, real, chunk)[0], error, **plain)})
        value, error = quality.mmd2(fake, real, kernel, chunk)
        lowest = quality.mmd2(floor, real, kernel, chunk)[0]
        self.add({"mmd2": Metric.of(value, lowest, error, kernel=f"gaussian, {width:.3g} wide", **plain)})
        known = self.info.get("density", {})
        if "modes" in known:
            centres, sd = torch.tensor(known["modes"]).double(), float(known["sd"])
            found = quality.modes(undo(self.drawn.x, self.info), centres, sd)
            best = quality.modes(undo(reference, self.info), centres, sd)
            plain = {"n": context["n"], "sampling": context["sampling"], "modes": len(centres), "within_sd": 3.0}
            self.add({name: Metric.of(value, best[name], **plain) for name, value in found.items()})
            if found["modes_found"] < len(centres):
                lost = len(centres) - int(found["modes_found"])
                self.result.warnings.append(f"{lost} of the {len(centres)} modes are not found by the samples.")

    def _codes(self) -> None:
        self.counts: dict[str, Tensor] = {}
        if isinstance(self.model, HasCodes):
            codes = encode(self.model, self.test, self.options.batch_size)
            metrics, self.counts, warnings = code_metrics(self.model, self.spec, codes)
            self.add(metrics)
            self.result.warnings += warnings
            self.result.details["code_counts"] = {level: c.tolist() for level, c in self.counts.items()}

    def _latents(self) -> None:
        self.kl: Tensor | None = None
        if isinstance(self.model, HasPosterior):
            metrics, details, warnings = latent_metrics(self.model, self.test, self.options)
            self.add(metrics)
            self.result.details |= details
            self.result.warnings += warnings
            self.kl = torch.tensor(details["kl_by_dimension"])

    def _reconstructions(self) -> None:
        self.reconstructed: Tensor | None = None
        if can_reconstruct(self.model):
            self.reconstructed, how = reconstruct(self.model, self.test, self.options.batch_size)
            self.add(reconstruction_metrics(self.reconstructed, how, self.test, self.spec, self.judge))

    def _energy(self) -> None:
        self.add(energy_metrics(self.model, self.spec, self.options.energy_draws))

    def _inverse(self) -> None:
        metrics, warnings = inverse_metrics(self.model, self.test, self.options.batch_size)
        self.add(metrics)
        self.result.warnings += warnings

    def _neighbours(self) -> None:
        """Samples that lie much nearer to training examples than test examples do were learnt by heart."""
        if not self.enough:
            return
        queries = self.drawn.x[:QUERIES]
        # Codes are names: what counts is how many of them differ.
        order = 0.0 if self.spec.kind == "codes" else 2.0
        train, real = self._flat(self.train.x), self._flat(take(iter([self.test]), QUERIES).x)
        distance, self.nearest = torch.cdist(self._flat(queries), train, p=order).topk(
            min(self.options.neighbours, len(train)), largest=False
        )
        floor = torch.cdist(real, train, p=order).amin(1).median().clamp_min(1e-12)
        ratio = (distance[:, 0].median() / floor).item()
        about = "median distance of samples to their nearest training example, over that of held-out examples"
        context = {"n": len(queries), "n_train": len(train), "unit": about}
        self.add({"nearest_train_ratio": Metric.of(ratio, 1.0, **context)})
        if ratio < 0.25 and self.spec.kind != "codes":  # a small grid of codes recurs without being learnt by heart
            self.result.warnings.append(
                f"Samples lie {ratio:.2f} times as far from training examples as held-out examples do: the model may "
                "have learnt examples by heart, or it makes only the plainest ones. Look at the nearest neighbours."
            )

    def _flat(self, x: Tensor) -> Tensor:
        return unit(x, self.spec).flatten(1).float()

    def _pictures(self) -> None:
        model, spec, test, o, shown = self.model, self.spec, self.test, self.options, self.display
        mixed = take(iter([test]), o.tiles**2)
        self.show("real.png", figures.tiled(mixed.x, spec, o.tiles, shown, f"Examples of the {o.split} split"))
        if self.reconstructed is not None:
            again = take(iter([Batch(self.reconstructed)]), o.tiles**2).x
            self.show(
                "reconstructed.png", figures.tiled(again, spec, o.tiles, shown, "The same examples, reconstructed")
            )
        if self.enough:
            self.show("samples.png", figures.tiled(self.drawn.x, spec, o.tiles, shown, "Samples"))
            if self.means is not None:
                what = "Means decoded from draws of the prior"
                self.show("sample_means.png", figures.tiled(self.means, spec, o.tiles, shown, what))
            plane = figures.plane(model, test.x, self.drawn.x, spec, by_labels=self.by_labels)
            self.show("density.png" if spec.dims == 2 else "coordinates.png", plane)
            if spec.kind != "vector":
                few = slice(0, o.tiles)
                found = self.nearest[few]
                self.show("neighbours.png", figures.neighbours(self.drawn.x[few], self.train.x, found, spec, shown))
        if self.by_labels and spec.kind != "vector" and not spec.context:
            classes = min(spec.classes, CLASSES_SHOWN)
            labels = torch.arange(classes).repeat_interleave(o.tiles)
            x = draw(model, len(labels), test, o.sampling, o.batch_size, labels=labels).x
            self.show("samples_by_class.png", figures.by_class(x, classes, spec, shown))
        drawn_at = figures.temperatures(model, self._draw_at, test.x, spec, o.tiles, shown)
        self.show("temperatures.png", drawn_at)
        paths = figures.interpolations(model, test, spec, shown, by_labels=self.by_labels)
        self.show("interpolations.png", paths)
        self.show("traversals.png", figures.traversals(model, mixed, spec, shown, self.kl))
        if self.kl is not None:
            self.show("kl.png", figures.kl_bars(self.kl))
        self.show("code_usage.png", figures.code_usage(self.counts))
        self.show("receptive_fields.png", figures.receptive_fields(model, spec, o.tiles))

    def _sounds(self) -> None:
        columns = {"real": self.test}
        if self.reconstructed is not None:
            columns["reconstructed"] = self.test._replace(x=self.reconstructed)
        if self.enough:
            columns["sampled"] = Batch(self.drawn.x, self.drawn.y)
        self.result.sounds, files = beside_each_other(columns, self.spec, self.info, self.display)
        self.images |= files

    def _draw_at(self, temperature: float) -> Tensor:
        """From the same random stream each time."""
        o = self.options
        n = o.samples if self.spec.kind == "vector" else ROWS_OF_A_TEMPERATURE * o.tiles
        sampling = {**o.sampling, "temperature": temperature}
        with seeded(self.seed):
            return draw(self.model, n, self.test, sampling, o.batch_size, by_labels=self.by_labels).x


def _distances(
    fake: Tensor, real: Tensor, floor: Tensor, options: EvaluationConfig, context: dict[str, Any]
) -> dict[str, Metric]:
    """On features; the floors are those of training examples in the samples' place."""
    metrics = {"frechet": Metric.of(quality.frechet(fake, real), quality.frechet(floor, real), **context)}
    value, error = quality.kid(fake, real, options.chunk)
    metrics["kid"] = Metric.of(value, quality.kid(floor, real, options.chunk)[0], error, **context)
    k = options.neighbours
    if min(len(real), len(floor)) > k:
        ours, best = (quality.prdc(real, points, k, options.chunk) for points in (fake, floor))
        metrics |= {name: Metric.of(value, best[name], neighbours=k, **context) for name, value in ours.items()}
    return metrics


def _environment(model: GenerativeModel) -> dict[str, str]:
    device = model.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else "none"
    return {"device": f"{device.type} ({kind})", "dtype": dtype, "torch": torch.__version__}

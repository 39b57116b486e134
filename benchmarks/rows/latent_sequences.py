"""Latents in sequence: codes of speech that keep what was said, and latents that a strong decoder cannot ignore."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, at_most, real_data, row
from benchmarks.rows.audio import DIGITS
from dgm_core.capabilities import HasLikelihood
from dgm_core.contract import GenerativeModel
from dgm_core.data.batches import one_pass
from dgm_core.data.shards import Dataset
from dgm_core.evaluation import codes
from dgm_core.evaluation.judge import Judge, fit_judge
from dgm_core.models.latent.delta_vae import DeltaVAE
from dgm_core.models.latent.vq_vae_wavenet import VQVAEWaveNet

SPEECH = (
    "Spoken digits, 8 kHz, the middle 2,048 samples of each clip that has as many, 256 µ-law levels, labelled by their "
    "six speakers; 2,284 train, 270 test"
)
HEARD = "test split; two judges, of digits and of speakers, trained on recordings; one draw of the decoder a clip"


def _speech(recognised: float) -> dict[str, Figure]:
    return {
        "samples a code": Figure("reduction", at_least(64), ""),
        "judge of digits, accuracy on recordings (ceiling)": Figure("share", unit=""),
        "digits recognised in reconstructions": Figure("class_agreement", at_least(recognised), ""),
        "digits recognised in another speaker's voice": Figure("class_agreement", unit=""),
        "judge of speakers, accuracy on recordings (ceiling)": Figure("share", unit=""),
        "that other speaker recognised": Figure("class_agreement", unit=""),
        "codes in use": Figure("share", unit=""),
        "perplexity over K": Figure("share", unit=""),
        "given the codes": Figure("bits_per_dim", unit="bits a sample"),
    }


@row(model="vq_vae_wavenet", data=SPEECH, estimator=HEARD, minutes=45, figures=_speech(0.6))
def vq_vae_wavenet_digits(workdir: Path) -> Measured:
    """32 codes a clip; the speaker is told to the decoder, the digit is not."""
    decoder = {"stacks": 1, "depth": 9, "channels": 64, "hidden": 64, "skip": 64, "head": 64}
    adam = {"lr": 2e-3, "warmup": 100, "schedule": "cosine", "final": 0.02, "ema": 0.998}
    recipe = {"batch_size": 8, "steps": 7000, "precision": "bf16", "optimizers": {"model": adam}}
    return _spoken(workdir, {"hidden": 128, "condition": 32, "decoder": decoder, "codebook": "ema"}, recipe)


@row(
    model="vq_vae_wavenet",
    data=f"{SPEECH}; a long run, for an accelerator",
    estimator=HEARD,
    minutes=60,
    figures=_speech(0.8),
)
def vq_vae_wavenet_digits_long(workdir: Path) -> Measured:
    """Two stacks of ten layers."""
    decoder = {"stacks": 2, "depth": 10, "channels": 128, "hidden": 128, "skip": 128, "head": 256}
    adam = {"lr": 1e-3, "warmup": 500, "schedule": "cosine", "final": 0.02, "ema": 0.999}
    recipe = {"batch_size": 32, "steps": 20_000, "optimizers": {"model": adam}}
    return _spoken(workdir, {"hidden": 256, "condition": 64, "decoder": decoder, "codebook": "ema"}, recipe)


def _spoken(workdir: Path, config: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, float]:
    digits = fit.dataset(workdir, "digits", path=str(real_data("spoken_digits")), **DIGITS)
    speakers = fit.dataset(workdir, "speakers", path=str(_by_speaker(workdir / "parquet")), **DIGITS)
    of_digits, of_speakers = _judge(digits), _judge(speakers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fit.train("vq_vae_wavenet", speakers, config=config, recipe=recipe, device=device)
    assert isinstance(model, VQVAEWaveNet)

    torch.manual_seed(0)
    found: dict[str, list[Tensor]] = {name: [] for name in ("digit", "digit_moved", "speaker_moved", "nats", "codes")}
    for spoken, by in zip(fit.held_out(digits, 90), fit.held_out(speakers, 90), strict=True):
        if spoken.y is None or by.y is None or not torch.equal(spoken.x, by.x):
            raise RuntimeError("the two data sets are not the same clips in the same order")
        other = (by.y + 1) % speakers.spec.classes
        with torch.no_grad():
            x, y = by.x.to(model.device), by.y.to(model.device)
            found["nats"].append(-model.log_prob(x, y).double().cpu())
            said = model.codes(x)
            found["codes"].append(said["top"].cpu())
            again, moved = (
                model.decode_codes(said, who.to(model.device)).cpu().round().to(by.x.dtype) for who in (by.y, other)
            )
        found["digit"].append(of_digits.classify(again) == spoken.y)
        found["digit_moved"].append(of_digits.classify(moved) == spoken.y)
        found["speaker_moved"].append(of_speakers.classify(moved) == other)
    mean = {name: torch.cat(parts).double().mean().item() for name, parts in found.items()}
    K, spec = model.config.codes, model.code_specs()["top"]
    counts = codes.histogram(torch.cat(found["codes"]), K)
    return {
        "samples a code": speakers.spec.dims / spec.dims,
        "judge of digits, accuracy on recordings (ceiling)": of_digits.accuracy or 0.0,
        "digits recognised in reconstructions": mean["digit"],
        "digits recognised in another speaker's voice": mean["digit_moved"],
        "judge of speakers, accuracy on recordings (ceiling)": of_speakers.accuracy or 0.0,
        "that other speaker recognised": mean["speaker_moved"],
        "codes in use": codes.usage(counts),
        "perplexity over K": codes.perplexity(counts) / K,
        # The bound's cost of the codes, log K each, is left out: it is the decoder that is asked.
        "given the codes": (mean["nats"] - spec.dims * math.log(K)) / (speakers.spec.dims * math.log(2)),
    }


def _by_speaker(folder: Path) -> Path:
    """The same recordings in the same order, labelled by who speaks: paths are digit_speaker_take.wav."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(real_data("spoken_digits").glob("*.parquet")):
        table = pq.read_table(file)
        who = pa.array([item["path"].split("_")[1] for item in table["audio"].to_pylist()])
        labelled = table.set_column(table.schema.get_field_index("label"), "label", who)
        group = pq.ParquetFile(file).metadata.row_group(0).num_rows  # the same groups, hence the same order
        pq.write_table(labelled.replace_schema_metadata(None), folder / file.name, row_group_size=group)
    return folder


def _judge(data: Dataset) -> Judge:
    return fit_judge(
        data.spec, partial(one_pass, data.split("train"), 512), held_out=partial(fit.held_out, data), seed=0
    )


SIZES = {"channels": 32, "depth": 7, "kernel": 5, "first_kernel": 7, "head": 64}
RATE = 4.0
ROUNDS = 1500
FIRST = 500  # test images that the rate is watched on, and that the importance-weighted bound is of


@row(
    model="delta_vae",
    data="MNIST, binarised anew every epoch; 50,000 train, 10,000 test (one fixed draw)",
    estimator=(
        f"gated PixelCNN decoders of equal size and as many rounds; rates on {FIRST} test images every 100 rounds; "
        "IS-16 with the auxiliary prior, and the decoder's exact likelihood, on the same images"
    ),
    minutes=45,
    figures={
        "decoder alone, −log p": Figure("nll_nats"),
        "plain VAE, KL": Figure("kl_nats", at_most(0.1)),
        "δ": Figure("rate_nats"),
        "least rate of any image over δ, throughout": Figure("ratio", at_least(0.9999), ""),
        "KL at the end": Figure("kl_nats"),
        "−log p, importance-weighted": Figure("nll_is16_nats"),
        "the latter over the decoder's alone": Figure("ratio", at_most(1.005), ""),
        "−ELBO with the AR(1) prior": Figure("elbo_nats"),
        "−ELBO with the auxiliary prior": Figure("elbo_nats"),
    },
)
def delta_vae_mnist(workdir: Path) -> Measured:
    source = {"source": "idx", "path": str(real_data("mnist")), "val": 10_000, "transform": "dynamic"}
    data = fit.dataset(workdir, "mnist", **source)
    first = next(fit.held_out(data, FIRST)).x
    adam = {"lr": 2e-3, "schedule": "cosine", "final": 0.1}
    rounds = {"batch_size": 64, "evaluate_every": 100}
    alone = fit.train(
        "gated_pixel_cnn",
        data,
        config={**SIZES, "conditional": False},
        recipe={"batch_size": 64, "steps": ROUNDS, "optimizers": {"model": {"algorithm": "adam", **adam}}},
    )
    assert isinstance(alone, HasLikelihood)
    share = 0.1
    steps = round(ROUNDS / (1 - share))  # as many of the model's own
    models, least = {}, {}
    for rate in (0.0, RATE):
        lowest: list[float] = []

        def watch(model: GenerativeModel, lowest: list[float] = lowest) -> Mapping[str, float]:
            kl = _rates(model, first)
            lowest.append(kl.min().item())
            return {"val/kl_nats": kl.mean().item()}

        models[rate] = fit.train(
            "delta_vae",
            data,
            config={"rate": rate, "decoder": SIZES, "auxiliary_share": share},
            recipe={**rounds, "steps": steps, "optimizers": {"model": {**adam, "ema": None}}},
            evaluate=watch,
        )
        least[rate] = min([*lowest, _rates(models[rate], first).min().item()])
    model = models[RATE]
    assert isinstance(model, DeltaVAE)
    with torch.no_grad():
        exact = -torch.cat([alone.log_prob(x).double() for x in first.split(50)]).mean().item()
        bound = -torch.cat([model.log_prob(x, samples=16).double() for x in first.split(10)]).mean().item()
        torch.manual_seed(0)
        fitted = -torch.cat([model.log_prob(x).double() for x in first.split(50)]).mean().item()
        torch.manual_seed(0)
        for p in model.auxiliary.out.parameters():
            p.zero_()  # what it adds to the AR(1) prior: nothing
        committed = -torch.cat([model.log_prob(x).double() for x in first.split(50)]).mean().item()
    return {
        "decoder alone, −log p": exact,
        "plain VAE, KL": _rates(models[0.0], first).mean().item(),
        "δ": model.rate,
        "least rate of any image over δ, throughout": least[RATE] / model.rate,
        "KL at the end": _rates(model, first).mean().item(),
        "−log p, importance-weighted": bound,
        "the latter over the decoder's alone": bound / exact,
        "−ELBO with the AR(1) prior": committed,
        "−ELBO with the auxiliary prior": fitted,
    }


@torch.no_grad()
def _rates(model: GenerativeModel, x: Tensor) -> Tensor:
    """KL from the prior that the rate is committed against, an image."""
    assert isinstance(model, DeltaVAE)
    return torch.cat([model.kl(part.to(model.device)).sum(1) for part in x.split(100)]).double().cpu()

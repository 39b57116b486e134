"""VAE/GAN beside a VAE of equal size on MNIST: do samples compared in learned features look more like the data?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import fit
from benchmarks.rows import Figure, Measured, at_least, at_most, real_data, row
from dgm_core.contract import GenerativeModel
from dgm_core.data.batches import one_pass
from dgm_core.evaluation import quality
from dgm_core.evaluation.judge import fit_judge
from dgm_core.models.latent.vae import VAE
from dgm_core.models.latent.vae_gan import VAEGAN

STEPS = 4000
LATENTS = 32
GAN: dict[str, Any] = {
    "latents": LATENTS,
    "encoder_channels": (32, 64, 128),
    "encoder_hidden": 256,
    "decoder_channels": (96, 64, 32),
    "discriminator_channels": (32, 64, 96, 128),
    "discriminator_hidden": 256,
}
PLAIN: dict[str, Any] = {"latents": LATENTS, "network": "conv", "channels": (64, 192, 256)}
SAMPLES = 5000


@row(
    model="vae_gan",
    data="MNIST, 8 bits; 50,000 train, 10,000 test",
    estimator=f"Fréchet distance on the judge's features, {SAMPLES:,} samples against 10,000 test images; {STEPS:,} "
    "rounds of three batches of 64; the VAE, convolutional and with discretised logistic pixels, has "
    f"{3 * STEPS:,} of one",
    minutes=40,
    figures={
        "Fréchet distance of the VAE/GAN's samples": Figure("frechet", unit=""),
        "Fréchet distance of the VAE's samples": Figure("frechet", unit=""),
        "Fréchet distance of the means that the VAE decodes": Figure("frechet", unit=""),
        "VAE/GAN over the better of the VAE's": Figure("ratio", at_most(1.0), ""),
        "Fréchet distance of training images (floor)": Figure("frechet", unit=""),
        "parameters of the VAE over the VAE/GAN's without its discriminator": Figure("ratio", at_least(1.0), ""),
        "judge's accuracy on originals": Figure("share", at_least(0.97), ""),
    },
)
def vae_gan_mnist(workdir: Path) -> Measured:
    data = fit.dataset(workdir, "mnist", source="idx", path=str(real_data("mnist")), val=10_000)
    judge = fit_judge(
        data.spec, lambda: one_pass(data.split("train"), 1000), held_out=lambda: fit.held_out(data), seed=0
    )
    ours = fit.train("vae_gan", data, config=GAN, recipe={"steps": STEPS})
    plain = fit.train("vae", data, config=PLAIN, recipe={"steps": 3 * STEPS, "batch_size": 64})
    assert isinstance(ours, VAEGAN)
    assert isinstance(plain, VAE)
    test = judge.features(torch.cat([batch.x for batch in fit.held_out(data)]))
    train = judge.features(next(one_pass(data.split("train"), SAMPLES)).x)

    def distance(draw: Any) -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            x = torch.cat([draw(500) for _ in range(SAMPLES // 500)])
        return quality.frechet(judge.features(x), test)

    adversarial, sampled = distance(ours.sample), distance(plain.sample)
    decoded = distance(lambda n: plain.decode(plain.draw_latent(n)).round().to(data.spec.dtype))
    return {
        "Fréchet distance of the VAE/GAN's samples": adversarial,
        "Fréchet distance of the VAE's samples": sampled,
        "Fréchet distance of the means that the VAE decodes": decoded,
        "VAE/GAN over the better of the VAE's": adversarial / min(sampled, decoded),
        "Fréchet distance of training images (floor)": quality.frechet(train, test),
        "parameters of the VAE over the VAE/GAN's without its discriminator": _size(plain)
        / _size(ours, "discriminator"),
        "judge's accuracy on originals": judge.accuracy or 0.0,
    }


def _size(model: GenerativeModel, without: str = "-") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(without))

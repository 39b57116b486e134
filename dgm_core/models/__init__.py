"""The table of contents: every model by name. A new model is one file and one line here."""

from dgm_core.contract import GenerativeModel
from dgm_core.models.adversarial.wgan_gp import WGANGP
from dgm_core.models.autoregressive.gated_pixel_cnn import GatedPixelCNN
from dgm_core.models.autoregressive.pixel_snail import PixelSnail
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.models.flow.real_nvp import RealNVP
from dgm_core.models.latent.ppca import PPCA
from dgm_core.models.latent.vae import VAE
from dgm_core.models.latent.vq_vae import VQVAE
from dgm_core.models.latent.vq_vae2 import VQVAE2

CATALOG: dict[str, type[GenerativeModel]] = {
    "ppca": PPCA,  # Tipping & Bishop 1999
    "vae": VAE,  # Kingma & Welling 2014
    "vq_vae": VQVAE,  # van den Oord, Vinyals & Kavukcuoglu 2017
    "vq_vae2": VQVAE2,  # Razavi, van den Oord & Vinyals 2019
    "real_nvp": RealNVP,  # Dinh, Sohl-Dickstein & Bengio 2017
    "gated_pixel_cnn": GatedPixelCNN,  # van den Oord et al. 2016
    "pixel_snail": PixelSnail,  # Chen et al. 2018
    "wgan_gp": WGANGP,  # Gulrajani et al. 2017
    "rbm": RBM,  # Smolensky 1986; Hinton 2002; Tieleman 2008
}

"""The table of contents: every model by name. A new model is one file and one line here."""

from dgm_core.contract import GenerativeModel
from dgm_core.models.adversarial.ac_gan import ACGAN
from dgm_core.models.adversarial.biggan import BigGAN
from dgm_core.models.adversarial.biggan_deep import BigGANDeep
from dgm_core.models.adversarial.cgan import CGAN
from dgm_core.models.adversarial.dcgan import DCGAN
from dgm_core.models.adversarial.gan import GAN
from dgm_core.models.adversarial.gmmn import GMMN
from dgm_core.models.adversarial.improved_gan import ImprovedGAN
from dgm_core.models.adversarial.predictability import Predictability
from dgm_core.models.adversarial.pro_gan import ProGAN
from dgm_core.models.adversarial.sagan import SAGAN
from dgm_core.models.adversarial.stylegan import StyleGAN
from dgm_core.models.adversarial.wgan import WGAN
from dgm_core.models.adversarial.wgan_gp import WGANGP
from dgm_core.models.autoregressive.diagonal_bilstm import DiagonalBiLSTM
from dgm_core.models.autoregressive.gated_pixel_cnn import GatedPixelCNN
from dgm_core.models.autoregressive.made import MADE
from dgm_core.models.autoregressive.pixel_cnn import PixelCNN
from dgm_core.models.autoregressive.pixel_cnn_pp import PixelCNNPP
from dgm_core.models.autoregressive.pixel_snail import PixelSnail
from dgm_core.models.autoregressive.row_lstm import RowLSTM
from dgm_core.models.autoregressive.wavenet import WaveNet
from dgm_core.models.belief.helmholtz import Helmholtz
from dgm_core.models.belief.nvil import NVIL
from dgm_core.models.belief.sbn import SBN
from dgm_core.models.boltzmann.dbm import DBM
from dgm_core.models.boltzmann.dbn import DBN
from dgm_core.models.boltzmann.rbm import RBM
from dgm_core.models.flow.glow import Glow
from dgm_core.models.flow.iaf import IAF
from dgm_core.models.flow.maf import MAF
from dgm_core.models.flow.nice import NICE
from dgm_core.models.flow.planar_flow import PlanarFlow
from dgm_core.models.flow.radial_flow import RadialFlow
from dgm_core.models.flow.real_nvp import RealNVP
from dgm_core.models.latent.beta_vae import BetaVAE
from dgm_core.models.latent.delta_vae import DeltaVAE
from dgm_core.models.latent.flow_vae import FlowVAE
from dgm_core.models.latent.iaf_vae import IAFVAE
from dgm_core.models.latent.ppca import PPCA
from dgm_core.models.latent.vae import VAE
from dgm_core.models.latent.vae_gan import VAEGAN
from dgm_core.models.latent.vq_vae import VQVAE
from dgm_core.models.latent.vq_vae2 import VQVAE2
from dgm_core.models.latent.vq_vae_wavenet import VQVAEWaveNet

CATALOG: dict[str, type[GenerativeModel]] = {
    "ppca": PPCA,  # Tipping & Bishop 1999
    "vae": VAE,  # Kingma & Welling 2014
    "beta_vae": BetaVAE,  # Higgins et al. 2017; Burgess et al. 2018
    "delta_vae": DeltaVAE,  # Razavi, van den Oord, Poole & Vinyals 2019
    "vae_gan": VAEGAN,  # Larsen, Sønderby, Larochelle & Winther 2016
    "flow_vae": FlowVAE,  # Rezende & Mohamed 2015
    "iaf_vae": IAFVAE,  # Kingma et al. 2016
    "vq_vae": VQVAE,  # van den Oord, Vinyals & Kavukcuoglu 2017
    "vq_vae_wavenet": VQVAEWaveNet,  # van den Oord, Vinyals & Kavukcuoglu 2017
    "vq_vae2": VQVAE2,  # Razavi, van den Oord & Vinyals 2019
    "planar_flow": PlanarFlow,  # Rezende & Mohamed 2015
    "radial_flow": RadialFlow,  # Rezende & Mohamed 2015
    "nice": NICE,  # Dinh, Krueger & Bengio 2015
    "real_nvp": RealNVP,  # Dinh, Sohl-Dickstein & Bengio 2017
    "maf": MAF,  # Papamakarios, Pavlakou & Murray 2017
    "iaf": IAF,  # Kingma et al. 2016
    "glow": Glow,  # Kingma & Dhariwal 2018
    "made": MADE,  # Germain, Gregor, Murray & Larochelle 2015
    "row_lstm": RowLSTM,  # van den Oord, Kalchbrenner & Kavukcuoglu 2016
    "diagonal_bilstm": DiagonalBiLSTM,  # van den Oord, Kalchbrenner & Kavukcuoglu 2016
    "pixel_cnn": PixelCNN,  # van den Oord, Kalchbrenner & Kavukcuoglu 2016
    "gated_pixel_cnn": GatedPixelCNN,  # van den Oord et al. 2016
    "pixel_cnn_pp": PixelCNNPP,  # Salimans, Karpathy, Chen & Kingma 2017
    "pixel_snail": PixelSnail,  # Chen et al. 2018
    "wavenet": WaveNet,  # van den Oord et al. 2016
    "gan": GAN,  # Goodfellow et al. 2014
    "cgan": CGAN,  # Mirza & Osindero 2014
    "ac_gan": ACGAN,  # Odena, Olah & Shlens 2017
    "dcgan": DCGAN,  # Radford, Metz & Chintala 2016
    "improved_gan": ImprovedGAN,  # Salimans et al. 2016
    "wgan": WGAN,  # Arjovsky, Chintala & Bottou 2017
    "wgan_gp": WGANGP,  # Gulrajani et al. 2017
    "pro_gan": ProGAN,  # Karras, Aila, Laine & Lehtinen 2018
    "sagan": SAGAN,  # Zhang, Goodfellow, Metaxas & Odena 2018
    "stylegan": StyleGAN,  # Karras, Laine & Aila 2019
    "biggan": BigGAN,  # Brock, Donahue & Simonyan 2018
    "biggan_deep": BigGANDeep,  # Brock, Donahue & Simonyan 2018
    "gmmn": GMMN,  # Li, Swersky & Zemel 2015
    "predictability": Predictability,  # Schmidhuber 1992; Schmidhuber, Eldracher & Foltin 1996
    "rbm": RBM,  # Smolensky 1986; Hinton 2002; Tieleman 2008
    "dbm": DBM,  # Salakhutdinov & Hinton 2009
    "dbn": DBN,  # Hinton, Osindero & Teh 2006
    "sbn": SBN,  # Neal 1992; Saul, Jaakkola & Jordan 1996
    "helmholtz": Helmholtz,  # Dayan, Hinton, Neal & Zemel 1995; Hinton et al. 1995; Bornschein & Bengio 2015
    "nvil": NVIL,  # Mnih & Gregor 2014; Mnih & Rezende 2016; Paisley, Blei & Jordan 2012
}

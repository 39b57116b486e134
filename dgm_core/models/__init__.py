"""The table of contents: every model by name. A new model is one file and one line here."""

from dgm_core.contract import GenerativeModel
from dgm_core.models.latent.ppca import PPCA

CATALOG: dict[str, type[GenerativeModel]] = {
    "ppca": PPCA,  # Tipping & Bishop 1999
}

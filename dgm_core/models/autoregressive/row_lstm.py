"""Pixel Recurrent Neural Networks. A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu, 2016. arXiv:1601.06759.

Its Row LSTM: p(x) = Π_i p(x_i | x_<i) (eq. 1), pixels in raster order, within a pixel R → G → B (eq. 2), a softmax over
the levels of each (of two levels, the paper's sigmoid). An LSTM runs from top to bottom over whole rows (§3.1),

    [o, f, i, g] = σ(K^ss ⊛ h_{r−1} + K^is ⊛ x_r)  (tanh for g),
    c_r = f ⊙ c_{r−1} + i ⊙ g,   h_r = o ⊙ tanh(c_r),                                        (eq. 3)

K^ss and K^is convolutions along the row, 3 wide, the latter with mask B and applied to the whole map at once. The
rest of the network (§3.3, fig. 5, table 1) is `pixel_rnn`'s. The initial state is learnt; RMSProp, batches of 16
(§5.2).

What a pixel sees of the rows above is a triangle (fig. 4): u rows up nothing more than u + 2 columns to its right.

Departures: on the initialisation the paper is silent: Glorot's, the forget gates' bias one. RMSProp's rate, which the
paper sets by hand for every data set, is 1e-4, and 1e-3 for binary images. The states beside the map's edge, of which
the paper does not speak, are the initial one too. The form of the layer-to-output connections is not given either: here
the first 1×1 layer reads all layers' outputs. Labels and contexts, if wanted, are this library's; codes enter by
embeddings.
Expected: 80.54 nats on binarised MNIST and 3.07 bits/dim on CIFAR-10 in the paper, not run here; a step beside
diagonal_bilstm's: `python -m benchmarks.autoregressive`.
"""

from __future__ import annotations

from pydantic import Field

from dgm_core.models.autoregressive.pixel_rnn import PixelRNN
from dgm_core.nn.causal import OddKernel
from dgm_core.nn.recurrent import RowLSTM as RowLayer
from dgm_core.nn.tokens import grid_shape


class RowLSTM(PixelRNN):
    """LSTM layers from row to row, each over a triangle of what is above."""

    class Config(PixelRNN.Config):
        kernel: OddKernel = Field(default=3, description="columns of K^ss, and of K^is before its mask")

    def layer(self, features: int, sides: int, pixels: int) -> RowLayer:
        assert isinstance(self.config, RowLSTM.Config)
        colours, height, width = grid_shape(self.data)
        return RowLayer(features, self.config.hidden, (height, width), self.config.kernel, colours, sides)

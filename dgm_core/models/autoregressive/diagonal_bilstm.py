"""Pixel Recurrent Neural Networks. A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu, 2016. arXiv:1601.06759.

Its Diagonal BiLSTM: p(x) = Π_i p(x_i | x_<i) (eq. 1), pixels in raster order, within a pixel R → G → B (eq. 2), a
softmax over the levels of each (of two levels, the paper's sigmoid). Two LSTMs start in the upper corners and run over
whole diagonals of the map (§3.2, fig. 3): at row r, column j

    [o, f, i, g] = σ(K^ss ⊛ [h_{r, j−1}, h_{r−1, j}] + K^is x_{r, j})  (tanh for g),
    c_{r, j} = f ⊙ c_{r, j−1} + i ⊙ g,   h_{r, j} = o ⊙ tanh(c_{r, j}),                      (eq. 3)

and likewise from right to left. The states from right to left are shifted down by one row and added to the others, so
that all that precedes a pixel is seen (fig. 4) and nothing else. K^is is a 1×1 convolution with mask B, applied to the
whole map at once. The rest of the network (§3.3, fig. 5, table 1) is `pixel_rnn`'s. The initial state is learnt;
RMSProp, batches of 16 (§5.2).

Departures: the first layer's right-to-left half reads, besides the features, the pixels themselves. Below mask A the
features at a pixel do not contain the pixel, so that without this a row's last pixel were hidden from the next row but
for what the first convolution reaches, contrary to fig. 4; the shift by a row makes it legal. On the initialisation the
paper is silent: Glorot's, the forget gates' bias one. RMSProp's rate, which the paper sets by hand for every data set,
is 1e-4, and 1e-3 for binary images. The states beyond the map's edge, of which the paper does not speak, are the
initial one. The form of the layer-to-output connections is not given either: here the first 1×1 layer reads all layers'
outputs. Labels and contexts, if wanted, are this library's; codes enter by embeddings.
Expected: 79.20 nats on binarised MNIST (80.75 with one layer of 32) and 3.00 bits/dim on CIFAR-10 in the paper, not run
here; beside a loop over pixels, and its step beside row_lstm's: `python -m benchmarks.autoregressive`.
"""

from __future__ import annotations

from dgm_core.models.autoregressive.pixel_rnn import PixelRNN
from dgm_core.nn.recurrent import DiagonalBiLSTM as DiagonalLayer
from dgm_core.nn.tokens import grid_shape


class DiagonalBiLSTM(PixelRNN):
    """LSTM layers from diagonal to diagonal, from both upper corners: all that precedes is seen."""

    def layer(self, features: int, sides: int, pixels: int) -> DiagonalLayer:
        colours, height, width = grid_shape(self.data)
        return DiagonalLayer(features, self.config.hidden, (height, width), colours, sides, pixels)

"""What the tests of both recurrent networks need: who influences whom, and which weights no gradient reaches."""

from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from dgm_core.contract import DataSpec


class Features(nn.Module):
    """Lets real-valued inputs through in place of the embedding, so that there is something to differentiate by."""

    def forward(self, x, like):
        return x


def build(model, shape, **config):
    torch.manual_seed(0)
    data = DataSpec("image", shape, 4)
    return model(model.tiny(data)[0].merged(config), data).double().network


def influence(model, shape, change=lambda network: None, **config):
    """Whether the logits of one coordinate depend on another: (channel, row, column) twice."""
    network = build(model, shape, **config)
    for parameter in network.parameters():  # biases and first states too, so that no path is closed by a zero
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        change(network)
    network.embed = Features()
    x = torch.randn(1, *shape, dtype=torch.float64)
    with mock.patch.object(F, "relu", F.softplus):  # a ReLU that is off would hide a path
        return torch.autograd.functional.jacobian(lambda t: network(t, None).sum(-1), x)[0, :, :, :, 0] != 0


def unreached(model, shape):
    """Names of parameters of which some entry that no mask covers gets no gradient."""
    network = build(model, shape)
    x = torch.randint(4, (8, *shape))
    with mock.patch.object(F, "relu", F.softplus):
        network(x, None).square().sum().backward()
    masks = {}
    for name, module in network.named_modules():
        mask = getattr(module, "mask", None)
        if mask is not None:
            masks[f"{name}.into" if hasattr(module, "into") else f"{name}.weight"] = mask
    return [
        name
        for name, p in network.named_parameters()
        if ((p.grad == 0) & (masks.get(name, torch.ones_like(p)).expand_as(p) != 0)).any()
    ]

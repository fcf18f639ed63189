"""A network in parts: its backbone, which may be frozen, and its head."""

import torch
from torch import Tensor, nn

from model.fusion import StudyNetwork
from model.networks import find_head
from pipeline.base.errors import DataError


def freeze(network: nn.Module) -> nn.Module:
    """The network for images, of which only the last layer learns."""
    network.requires_grad_(False)
    find_head(network)[1].requires_grad_(True)
    return network


def begin_training(network: nn.Module) -> None:
    """Put the network into training mode, but for a frozen backbone: its BatchNorm statistics stay as they are."""
    learns = [parameter.requires_grad for parameter in network.parameters()]
    network.train(all(learns) or isinstance(network, StudyNetwork))


def embed(network: nn.Module, inputs: Tensor) -> Tensor:
    """The backbone's embeddings [N, features] of normalized images [N, 1, H, W].

    Raises DataError for a network for images whose logits are not what its last linear layer makes of them.
    """
    if isinstance(network, StudyNetwork):
        features: Tensor = network.backbone(inputs)
        return features
    head = find_head(network)[1]
    found: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    try:
        logits = network(inputs)
    finally:
        handle.remove()
    if not (found and found[-1].ndim == 2 and torch.equal(head(found[-1]), logits)):
        raise DataError("embeddings are for networks that end in a linear layer")
    return found[-1]

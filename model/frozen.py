"""The parts of a network: its backbone, which may be frozen, and its head; the depth of each block."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.fusion import StudyNetwork
from model.networks import find_head
from pipeline.base.errors import DataError


def freeze(network: nn.Module) -> nn.Module:
    """The network for images, with all but the last layer frozen."""
    network.requires_grad_(False)
    find_head(network)[1].requires_grad_(True)
    return network


def begin_training(network: nn.Module) -> None:
    """Put the network into training mode, except a frozen backbone: its BatchNorm statistics do not change."""
    learns = [parameter.requires_grad for parameter in network.parameters()]
    network.train(all(learns) or isinstance(network, StudyNetwork))


def embed(network: nn.Module, inputs: Tensor) -> Tensor:
    """The backbone's embeddings [N, features] of normalized images [N, 1, H, W].

    Raises DataError if the logits of a network for images are not the output of its last linear layer.
    """
    if isinstance(network, StudyNetwork):
        features: Tensor = network.backbone(inputs)
        return features
    head = find_head(network)[1]
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, given: captured.append(given[0]))
    try:
        logits = network(inputs)
    finally:
        handle.remove()
    if not (captured and captured[-1].ndim == 2 and torch.equal(head(captured[-1]), logits)):
        raise DataError("embeddings are for networks that end in a linear layer")
    return captured[-1]


def find_depths(network: nn.Module) -> dict[nn.Parameter, int]:
    """How many blocks before the head each parameter is; 0 for the head and for layers that fuse views.

    Blocks are the network's modules in definition order, with a Sequential or ModuleList replaced by its members. A
    module whose children have weights begins a block; a single layer belongs to the previous block. The first block
    includes what precedes it, such as a transformer's position embeddings. So the blocks of a ResNet are a stem and the
    residual blocks, those of a DenseNet its dense blocks, and those of a vision transformer its layers.
    """
    head = find_head(network)[1]
    trunk = network.backbone if isinstance(network, StudyNetwork) else network
    number = 0
    blocks = dict.fromkeys(trunk.parameters(recurse=False), 0)
    begun = False
    for part in _open(trunk):
        if head in part.modules() or not _has_weights(part):
            continue
        number += begun and any(_has_weights(layer) for layer in part.children())
        begun = True
        blocks |= dict.fromkeys(part.parameters(), number)
    return {
        parameter: number + 1 - blocks[parameter] if parameter in blocks else 0 for parameter in network.parameters()
    }


def _open(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module, with lists of modules expanded."""
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _open(child)
        else:
            yield child


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None

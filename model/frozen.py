"""A network in parts: its backbone, which may be frozen, and its head; the depth of each block."""

from collections.abc import Iterator

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


def find_depths(network: nn.Module) -> dict[nn.Parameter, int]:
    """How many blocks before the head each parameter is; 0 for the head, and for what fuses views.

    Blocks are the network's modules in the order of their definition, where a Sequential or ModuleList stands for those
    in it. A module whose own layers have weights begins a block; a single layer belongs to the block before it. The
    first block takes what comes before, such as the position embeddings of a transformer. So ResNets have their
    residual blocks and a stem, DenseNets their dense blocks, vision transformers their layers.
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
    """The children of a module; for lists of modules, theirs."""
    for child in module.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            yield from _open(child)
        else:
            yield child


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None

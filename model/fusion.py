"""The views of a study → logits of the study: one backbone for all views, which are then pooled.

Every view goes through the same backbone, a network for single images (model.networks). Its features are scaled and
shifted by parameters learned per projection (FiLM, Perez et al., AAAI 2018), because a finding looks different from
the side. Then the features or logits of the views that are present are pooled. Initially, all projections are
treated alike and all views count equally, so a network that starts from a run on images scores as that run does.
"""

import torch
from torch import Tensor, nn

from model.networks import Head, find_head
from pipeline.labels import PROJECTIONS


class StudyNetwork(nn.Module):
    """`max` and `mean` pool features; `attention` weighs the views' logits, separately for each label.

    Attention is a softmax over a study's views of a linear function of their features (after Ilse et al., ICML
    2018). A `frozen` backbone keeps its weights and BatchNorm statistics; only the new layers are trained.
    """

    def __init__(self, network: nn.Module, fusion: str, frozen: bool) -> None:
        """Split a network for images: everything before its last linear layer is the backbone."""
        super().__init__()
        self.fusion, self.frozen = fusion, frozen
        self.place, head = find_head(network)
        network.set_submodule(self.place, nn.Identity())
        self.backbone, self.head = network.requires_grad_(not frozen), head
        self.projection = nn.Parameter(torch.zeros(len(PROJECTIONS), 2, head.in_features))  # scale - 1, and shift
        if fusion == "attention":
            self.attention = Head(nn.Linear(head.in_features, head.out_features, bias=False))
            nn.init.zeros_(self.attention.weight)  # equal weights for all views

    def train(self, mode: bool = True) -> "StudyNetwork":
        """As in torch, except that a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, images: Tensor, present: Tensor, projection: Tensor) -> Tensor:
        """Logits [B, outputs] of studies.

        `present` bool [B, V] says which places hold a view, at least one per study; `images` [N, 1, H, W] are these
        views in order, and `projection` int [N] their indices in PROJECTIONS, or UNKNOWN_FRONTAL: the mean of AP's
        and PA's parameters.
        """
        unknown = self.projection[[PROJECTIONS.index(name) for name in ("AP", "PA")]].mean(0, keepdim=True)
        scale, shift = torch.cat([self.projection, unknown])[projection.long()].unbind(1)
        features = self.backbone(images) * (1 + scale) + shift
        if self.fusion == "attention":
            weights = _spread(self.attention(features), present, hide=True).softmax(dim=1)
            return (_spread(self.head(features), present) * weights).sum(dim=1)
        if self.fusion == "mean":
            pooled = _spread(features, present).sum(dim=1) / present.sum(dim=1, keepdim=True)
        else:
            pooled = _spread(features, present, hide=True).amax(dim=1)
        logits: Tensor = self.head(pooled)
        return logits


def freeze(network: nn.Module) -> nn.Module:
    """The network for images, with all but the last layer frozen."""
    network.requires_grad_(False)
    find_head(network)[1].requires_grad_(True)
    return network


def begin_training(network: nn.Module) -> None:
    """Put the network into training mode, except a frozen backbone: its BatchNorm statistics do not change."""
    learns = [parameter.requires_grad for parameter in network.parameters()]
    network.train(all(learns) or isinstance(network, StudyNetwork))


def _spread(values: Tensor, present: Tensor, hide: bool = False) -> Tensor:
    """Values [N, F] of the present views, put at their places [B, V, F]; elsewhere 0 or, to hide them, the least."""
    absent = torch.finfo(values.dtype).min if hide else 0.0
    return values.new_full((*present.shape, values.shape[1]), absent).masked_scatter(present[..., None], values)

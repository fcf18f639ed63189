"""Architecture name → network from gray images [B, 1, H, W] to logits [B, outputs], and its initial weights.

torchvision's networks are changed in one place: the weights of the first convolution are summed over its three
input channels. So for a gray image, each gives the output of torchvision's network for that image in all three
channels, with random weights or ImageNet's. timm's networks do the same, and define the size and gray scale of their
input (`own_input`). The last layer is a `Head`: under autocast, its logits stay float32. `StudyNetwork` pools views.
"""

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoint import CheckpointError, Start, cannot_download, hub_path
from model.names import find_config, own_input, parse_shape, split_arch
from pipeline.base.errors import DataError, SettingError
from pipeline.labels import LABELS, PROJECTIONS

_OTHER_WAYS = "choose another `arch`, or `init` FILE"
_WITHOUT = "; `no_pretrained` (in make: PRETRAINED=no) starts from random weights"
LEAST = 0.9  # share of a backbone's weights that a file must hold
_RENAMED = (
    (r"(denselayer\d+\.\w+)\.([12]\.)", r"\1\2"),  # of torchvision's DenseNet, which torch no longer allows
    (r"blocks\.\d+\.(\d+\.)", r"blocks.\1"),  # of DINOv2, trained in chunks of blocks
    # The layout of transformers
    (r"\bembeddings\.position_embeddings$", "pos_embed"),
    (r"\bembeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\bembeddings\.((?:cls|mask|register)_tokens?)$", r"\1"),
    (r"\bencoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"(?:^|\.)layernorm\.", "norm."),
)


def weights_terms(arch: str) -> str:
    """The terms of the weights that `pretrained` loads."""
    config = find_config(arch)
    if config is None:
        terms = "BSD-3-Clause; trained on ImageNet, whose terms are for non-commercial research"
        return f"torchvision's ImageNet weights: {terms}"
    about = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
    name, terms = f"{config.architecture}.{config.tag}", config.license or "license not stated"
    return f"timm's weights {name}: {terms}; trained on what {about} names, on its terms"


def build_network(arch: str, outputs: int, shape: tuple[int, int] | None = None, pretrained: bool = False) -> nn.Module:
    """A freshly initialized network for images of a height and width; None: of the network's own.

    `pretrained` loads ImageNet weights, except into a classifier of another size. Raises CheckpointError if they do
    not exist or cannot be downloaded, and DataError for an unknown network.
    """
    if find_config(arch) is not None:
        return _build_timm(arch, outputs, shape, pretrained)
    if arch == "rescnn":
        if pretrained:
            raise CheckpointError(f"rescnn has no ImageNet weights; {_OTHER_WAYS}")
        network: nn.Module = ResCNN(outputs)
    else:
        from torchvision.models import get_model, get_model_weights  # here, because it takes seconds

        network = get_model(arch, weights=None, num_classes=outputs)
        stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        stem.in_channels, stem.weight = 1, nn.Parameter(stem.weight.detach().sum(dim=1, keepdim=True))
    path, layer = find_head(network)
    network.set_submodule(path, Head(layer))
    if pretrained:
        weights = get_model_weights(arch).DEFAULT
        about, place = f"the ImageNet weights of {arch}", hub_path(weights.url)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # torch announces a download
                state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
        except Exception as error:  # no connection, a wrong hash, a damaged file in the cache
            raise CheckpointError(cannot_download(about, weights.url, error, place) + _WITHOUT) from error
        load_initial(network, Start(Path(arch), "", state))
    return network


def check_shape(arch: str, shape: tuple[int, int]) -> None:
    """Raise SettingError if a network of timm takes no images of this height and width; takes no memory."""
    try:
        with torch.device("meta"), torch.no_grad():
            network = _create_timm(arch, 1, shape).eval()
            network(torch.zeros(1, 1, *shape))
    except Exception as error:  # of any type, from timm
        fault = " ".join(str(error).split())[:200]
    else:
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", (1, 1))
        if not any(side % part for side, part in zip(shape, patch, strict=True)):
            return
        fault = f"the sides must be multiples of {' and '.join(map(str, dict.fromkeys(patch)))}"
    own = own_input(arch)
    why = f"takes no images of {shape[0]}×{shape[1]}: {fault}"
    raise SettingError(f"`arch` {arch} {why}; its own `image_size` is {own and own.size}")


def _create_timm(arch: str, outputs: int, shape: tuple[int, int] | None, pretrained: bool = False) -> nn.Module:
    """A network as timm makes it, for gray images of this shape."""
    own = own_input(arch)
    import timm  # which `own_input` has found

    name, options = split_arch(arch)
    if own is not None and own.fixed and shape not in (None, parse_shape(own.size)):
        options["img_size"] = shape
    return timm.create_model(name, pretrained=pretrained, in_chans=1, num_classes=outputs, **options)


def _build_timm(arch: str, outputs: int, shape: tuple[int, int] | None, pretrained: bool) -> nn.Module:
    """A network from timm. Raises DataError if its classifier is not one linear layer."""
    try:
        network = _create_timm(arch, outputs, shape, pretrained)
    except Exception as error:  # no connection, no weights, a damaged file in the cache
        if not pretrained:
            raise
        config = find_config(arch)
        if config is None or not config.has_weights:
            raise CheckpointError(f"{arch} has no weights in timm; {_OTHER_WAYS}") from None
        url = str(config.url)
        if config.hf_hub_id:
            file = config.hf_hub_filename or "model.safetensors"
            url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
        raise CheckpointError(cannot_download(f"the weights of {arch}", url, error) + _WITHOUT) from error
    last = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(last, nn.Linear):
        raise DataError(f"'{arch}' ends in {type(last).__name__} and not in one linear layer: choose another `arch`")
    network.set_submodule(next(path for path, module in network.named_modules() if module is last), Head(last))
    return network


class Head(nn.Linear):
    """A linear layer that computes in float32 even under autocast; its state dict is that of any linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        # On meta, with the layer's parameters set afterwards: the random generator must not advance.
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, features: Tensor) -> Tensor:
        """Outputs [B, outputs] of features [B, inputs]."""
        if not torch.is_autocast_enabled(features.device.type):
            return super().forward(features)
        # In bf16 its outputs would have 8 bits: two thirds of an evaluation's scores would tie with others.
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.float())


def find_head(network: nn.Module) -> tuple[str, nn.Linear]:
    """The Head, or else the last linear layer, and its path in the network."""
    layers = [(path, layer) for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    return next((named for named in layers if isinstance(named[1], Head)), layers[-1])


def load_initial(network: nn.Module, start: Start, outputs: Sequence[str] = LABELS, needed: Sequence[str] = ()) -> str:
    """Load weights into a network with these outputs; returns a summary of what is loaded and what stays random.

    The classifier's rows are loaded for outputs of the same name, and none if the file's are unknown. Raises
    CheckpointError, naming the file, if less than `LEAST` of the backbone's weights are given, or blocks that it
    lacks, or if a `needed` output is not loaded.
    """
    own, head = network.state_dict(), find_head(network)[0]
    given, dropped = _rename(network, start)
    rows = {outputs.index(name): row for row, name in enumerate(start.outputs) if name in outputs}
    for name in (f"{head}.weight", f"{head}.bias"):
        part = given.pop(name, None)
        if rows and part is not None and name in own and part.shape[1:] == own[name].shape[1:]:
            if len(part) != len(start.outputs):
                raise CheckpointError(f"{start.path}: `init_labels` names {len(start.outputs)} outputs of {len(part)}")
            given[name] = own[name].clone()
            given[name][list(rows)] = part[list(rows.values())].to(own[name])
    fits = {name: value for name, value in given.items() if name in own and value.shape == own[name].shape}
    # Old files lack BatchNorm's counters, which are unused here.
    fresh = [name for name in own if name not in fits and not name.endswith("num_batches_tracked")]
    surplus = [name for name in given if name not in own]
    sizes = {name: value.numel() for name, value in own.items() if not name.startswith(f"{head}.")}
    share = sum(size for name, size in sizes.items() if name in fits) / sum(sizes.values())
    # All tensors of a resnet18 are also in a resnet34, which has more blocks of the same kind.
    kinds = {re.sub(r"\d+", "#", name) for name in sizes}
    deeper = [name for name in surplus if re.sub(r"\d+", "#", name) in kinds]
    if share < LEAST or deeper:
        fault = f"{_list_tensors(deeper)} are too many" if deeper else f"{_list_tensors(fresh)} are missing or differ"
        fault = f"not weights of this network, of whose backbone they are {share:.0%}: {fault}"
        raise CheckpointError(f"{start.path}: {fault}; they must be of the same `arch`")
    lacking = [name for number, name in enumerate(outputs) if number not in rows]
    headless = f"{head}.weight" in fresh
    if missing := [name for name in needed if headless or name in lacking]:
        raise CheckpointError(f"{start.path}: no classifier of {', '.join(missing)}; name its outputs by `init_labels`")
    network.load_state_dict(fits, strict=False)
    if lacking and not headless:
        fresh.append(f"the classifier of {', '.join(lacking)}")
    summary = f"loaded {len(fits):,} tensors; fresh: {_list_tensors(fresh) or 'nothing'}"
    return summary + (f"; left out: {_list_tensors(surplus + dropped)}" if surplus or dropped else "")


def _rename(network: nn.Module, start: Start) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file under the network's names, and the names of tensors that are not of this network.

    The network's names follow the prefix that most of them have in the file (`module.`, `teacher.backbone.`,
    `visual.trunk.`, …). timm converts other layouts of a network, and resamples position tables and patch embeddings
    from those of images of the file's size (empty: timm guesses).
    """
    own, tensors = network.state_dict(), dict[str, Tensor]()
    patterns = [(pattern, new) for pattern, new in _RENAMED if not any(re.search(pattern, name) for name in own)]
    for name, value in start.weights.items():
        for pattern, new in patterns:
            name = re.sub(pattern, new, name)
        tensors[name] = value
    # Of each name, what precedes an end that the network knows is a prefix; ends begin at the start or after a dot.
    cuts = ((name, match.start()) for name in tensors for match in re.finditer(r"^|(?<=\.)", name))
    prefixes = Counter(name[:start] for name, start in cuts if name[start:] in own)
    prefix = max(prefixes, key=lambda text: (prefixes[text], "student" not in text), default="")
    given = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    others = [name for name in tensors if not name.startswith(prefix)]
    for name in [name for name in given if ".attn.query." in name]:  # transformers' layout: one matrix each
        parts = [given.pop(name.replace(".query.", f".{part}."), torch.empty(0)) for part in ("query", "key", "value")]
        given[name.replace(".query.", ".qkv.")] = torch.cat(parts)
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is not None and type(network).__module__.startswith("timm."):
        if start.size:  # by which timm tells the grid of positions
            network.pretrained_model_args = {"img_size": parse_shape(start.size)}  # type: ignore[assignment]
        before = given
        try:
            given = convert(dict(before), network)
        except Exception as error:  # of any type, from timm
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{start.path}: not weights of this network: {reason}") from error
        kept = {id(value) for value in given.values()}
        others += [name for name, value in before.items() if name not in given and id(value) not in kept]
    stem = next(f"{name}.weight" for name, module in network.named_modules() if isinstance(module, nn.Conv2d))
    if stem in given and given[stem].shape[1:2] == (3,):
        given[stem] = given[stem].sum(dim=1, keepdim=True)
    return given, others


def _list_tensors(names: Sequence[str]) -> str:
    """The names of tensors; of more than four, those of the modules that have them, with their numbers."""
    if len(names) <= 4:
        return ", ".join(names)
    return ", ".join(f"{part} ({count})" for part, count in Counter(name.partition(".")[0] for name in names).items())


class ResCNN(nn.Module):
    """A small residual network (0.9 M weights, 0.2 G multiply-adds at 224 pixels) for CPUs and small sets.

    Stem (convolution, BatchNorm, ReLU, pooling), then per width in channels a residual block, which
    halves the resolution from the second on, and a bottleneck block; then a pooled classifier.
    """

    def __init__(self, outputs: int, widths: tuple[int, ...] = (32, 64, 128, 256)) -> None:
        super().__init__()
        channels = widths[0]
        self.stem = nn.Sequential(*_convolve((1, channels, 5, 2)), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks = []
        for width in widths:
            blocks.append(_Residual((channels, width, 3, width // channels), (width, width, 3, 1)))
            middle = width // 2
            blocks.append(_Residual((width, middle, 1, 1), (middle, middle, 3, 1), (middle, width, 1, 1)))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, outputs] of images [B, 1, H, W]."""
        logits: Tensor = self.head(self.blocks(self.stem(images)))
        return logits


class _Residual(nn.Module):
    """ReLU(branch(x) + shortcut(x)), He et al., 2016; if the shape changes, the shortcut is a strided convolution."""

    def __init__(self, *shapes: tuple[int, int, int, int]) -> None:
        super().__init__()
        (inputs, _, _, stride), (_, outputs, _, _) = shapes[0], shapes[-1]
        self.branch = _convolve(*shapes)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _convolve((inputs, outputs, 1, stride))

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.branch(features) + self.shortcut(features))


def _convolve(*shapes: tuple[int, int, int, int]) -> nn.Sequential:
    """Convolutions of these inputs, outputs, kernels and strides, each with a BatchNorm; with ReLUs between them."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel, stride in shapes:
        layers += [nn.ReLU()] if layers else []
        layers.append(nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False))
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers)


class StudyNetwork(nn.Module):
    """The views of a study → logits of the study: one backbone for all views, which are then pooled.

    The backbone is a network for images without its last linear layer. Features are scaled and shifted by parameters
    learned per projection (FiLM, Perez et al., AAAI 2018), because a finding looks different from the side. Then `max`
    and `mean` pool features; `attention` weighs the views' logits by a softmax over views of a linear function of
    their features, separately for each label (after Ilse et al., ICML 2018). Initially, all projections are treated
    alike and all views count equally, so a network that starts from a run on images scores as that run does. A
    `frozen` backbone keeps its weights and BatchNorm statistics; only the new layers are trained.
    """

    def __init__(self, network: nn.Module, fusion: str, frozen: bool) -> None:
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
    network.train(isinstance(network, StudyNetwork) or all(weight.requires_grad for weight in network.parameters()))


def _spread(values: Tensor, present: Tensor, hide: bool = False) -> Tensor:
    """Values [N, F] of the present views, put at their places [B, V, F]; elsewhere 0 or, to hide them, the least."""
    absent = torch.finfo(values.dtype).min if hide else 0.0
    return values.new_full((*present.shape, values.shape[1]), absent).masked_scatter(present[..., None], values)

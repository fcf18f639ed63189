"""Weights in the layouts of published checkpoints, at any size, against timm's own networks.

Each layout renames a network of timm as its paper's code does: MAE, DINOv2, transformers, EVA-02, open_clip and Ark.
"""

import argparse
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed

from model.checkpoint import CheckpointError, read_start
from model.names import published, split_arch
from model.networks import build_network, find_head, load_initial

State = dict[str, torch.Tensor]
VIT = "timm/vit_tiny_patch16_224?depth=2"


def rename(state: State, *changes: tuple[str, str]) -> State:
    """The backbone, with the names that these replacements of regular expressions give, in this order."""
    names = {name: name for name in state if not name.startswith("head.")}
    for pattern, new in changes:
        names = {name: re.sub(pattern, new, text) for name, text in names.items()}
    return {text: state[name] for name, text in names.items()}


def as_mae(state: State) -> dict[str, object]:
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 197, 8)}
    decoder |= {f"decoder_blocks.{block}.norm1.weight": torch.ones(8) for block in range(8)}
    return {"model": rename(state, ("fc_norm", "norm")) | decoder, "epoch": 799, "args": argparse.Namespace(blr=1.5e-4)}


def as_dinov2(state: State) -> dict[str, object]:
    """Of training, in chunks of blocks, with student and teacher."""
    teacher = rename(state | {"mask_token": torch.zeros(1, 96)}, ("blocks", "blocks.0"), ("^", "teacher.backbone."))
    student = {name.replace("teacher", "student"): value + 1 for name, value in teacher.items()}
    return {"model": student | teacher | {"teacher.dino_head.last_layer.weight_g": torch.ones(5, 1)}, "iteration": 1}


def as_transformers(state: State) -> dict[str, object]:
    """Of `Dinov2WithRegistersModel`, whose class token has no position of its own in timm."""
    renamed = rename(
        state | {"mask_token": torch.zeros(1, 96)},
        (r"^norm\.", "layernorm."),
        (r"patch_embed\.proj\.", "patch_embeddings.projection."),
        ("reg_token", "register_tokens"),
        ("pos_embed", "position_embeddings"),
        ("^((patch|position)_emb|(mask|register|cls)_tok)", r"embeddings.\1"),
        (r"blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.attention."),
        (r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1"),
    )
    for name in [name for name in renamed if ".qkv." in name]:
        parts = zip(("query", "key", "value"), renamed.pop(name).chunk(3), strict=True)
        renamed |= {name.replace("qkv", part): third for part, third in parts}
    positions = renamed["embeddings.position_embeddings"]
    own = torch.full_like(positions[:, :1], 0.25)
    renamed["embeddings.cls_token"] = renamed["embeddings.cls_token"] - own
    renamed["embeddings.position_embeddings"] = torch.cat([own, positions], dim=1)
    return dict(renamed)


def as_eva(state: State) -> dict[str, object]:
    changes = [("fc_norm", "norm"), (r"mlp\.norm", "mlp.ffn_ln"), ("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2")]
    changes += [(r"mlp\.fc1\.", "mlp.w12."), ("mlp.fc2", "mlp.w3")]
    if any("fc1_g" in name for name in state):
        changes.append((r"([qv])_proj\.bias", r"\1_bias"))
    others = {"mask_token": torch.zeros(1, 1, 8), "lm_head.weight": torch.ones(4, 8)}
    return {"module": rename(state, *changes) | others | {"rope.freqs_cos": torch.ones(196, 64)}}


def as_open_clip(state: State) -> dict[str, object]:
    name = "text.transformer.encoder.layer.{}.attention.output.dense.weight"
    text = {name.format(layer): torch.ones(2, 2) for layer in range(99)}
    others = {"visual.head.proj.weight": torch.ones(512, 192), "logit_scale": torch.ones(())}
    return {**text, **rename(state, ("^", "visual.trunk.")), **others}


def as_ark(state: State) -> dict[str, object]:
    """Of the first timm's Swin, which downsamples at the end of a stage."""
    others = {"omni_heads.0.weight": torch.ones(14, 8), "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    changes = [(rf"layers\.{stage}\.downsample", f"layers.{stage - 1}.downsample") for stage in (1, 2, 3)]
    return {"teacher": rename(state | others, *changes, ("^", "module.")), "epoch": 199}


def as_lightning(state: State) -> dict[str, object]:
    weights = rename(state, ("^", "model._orig_mod.vit.")) | {"loss.weight": torch.ones(14)}
    return {"state_dict": weights, "hyper_parameters": {"lr": 1e-4}}


def make_reference(arch: str) -> torch.nn.Module:
    """timm's own network over three channels, with weights that are not the first ones."""
    name, options = split_arch(arch)
    torch.manual_seed(1)
    network: torch.nn.Module = timm.create_model(name, num_classes=14, **options).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return network


# The layout of each published file, what makes a small network of its kind, and a part that is left out
SMALL = "depth=2&embed_dim=96&num_heads=3"
FILES = {
    "rad-dino": (as_dinov2, SMALL, "student ("),
    "eva-x": (as_eva, SMALL, "lm_head.weight"),
    "medical-mae": (as_mae, SMALL, "decoder_pos_embed (1), decoder_blocks (8), mask_token (1)"),
    "ark-plus": (as_ark, "depths=(2,2)&embed_dim=24&num_heads=(2,4)", "omni_heads.0.weight"),
    "cxformer": (as_transformers, SMALL, "mask_token"),
    "biomedclip": (as_open_clip, SMALL, "text ("),
    "of Lightning": (as_lightning, SMALL, "loss.weight"),
}


@torch.no_grad()
@pytest.mark.parametrize("small", [True, pytest.param(False, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", [*(name for name in published() if not name.startswith("xrv:")), "of Lightning"])
def test_a_published_layout_is_timms_network(name: str, small: bool, tmp_path: Path) -> None:
    """All of the backbone is loaded, and what else the file holds is named."""
    layout, smaller, dropped = next(made for start, made in FILES.items() if name.startswith(start))
    arch, path = published()[name].arch if name in published() else VIT, tmp_path / "weights.pth"
    if small:
        arch = f"{arch}{'&' if '?' in arch else '?'}{smaller}"
    reference = make_reference(arch)
    torch.save(layout(reference.state_dict()), path)
    ours = build_network(arch, 14).eval()
    summary = load_initial(ours, read_start(path)._replace(size=""))
    fresh = [*(["fc_norm"] if layout is as_mae else []), find_head(ours)[0]]  # MAE has no norm after the pooling
    assert f"; fresh: {', '.join(f'{part}.weight, {part}.bias' for part in fresh)}; left out: " in summary
    assert dropped in summary
    for part in fresh:
        reference.set_submodule(part, ours.get_submodule(part))
    images = torch.rand(2, 1, *reference.patch_embed.img_size)  # type: ignore[union-attr, misc]
    torch.testing.assert_close(ours(images), reference(images.expand(-1, 3, -1, -1)), rtol=0, atol=1e-4)


@torch.no_grad()
def test_positions_and_patches_are_resampled_as_timm_does(tmp_path: Path) -> None:
    reference, path = make_reference(VIT).state_dict(), tmp_path / "weights.pth"
    torch.save(as_mae(reference), path)
    ours = build_network(f"{VIT}&patch_size=8", 14, (96, 80))
    load_initial(ours, read_start(path))
    grid = resample_abs_pos_embed(reference["pos_embed"], new_size=[12, 10], num_prefix_tokens=1)
    torch.testing.assert_close(ours.get_parameter("pos_embed"), grid, rtol=0, atol=1e-6)
    patches = resample_patch_embed(reference["patch_embed.proj.weight"], [8, 8]).sum(1, keepdim=True)
    torch.testing.assert_close(ours.get_parameter("patch_embed.proj.weight"), patches, rtol=0, atol=1e-6)
    # From a rectangle: a run's file says which.
    again = build_network(VIT, 14, (80, 96))
    start = read_start(path)._replace(weights=ours.state_dict(), size="96x80")
    load_initial(again, start)
    rectangle = resample_abs_pos_embed(grid, new_size=[5, 6], old_size=[12, 10], num_prefix_tokens=1)
    torch.testing.assert_close(again.get_parameter("pos_embed"), rectangle, rtol=0, atol=1e-6)


def test_less_than_nine_tenths_of_a_backbone_are_refused(tmp_path: Path) -> None:
    state, path = make_reference(VIT).state_dict(), tmp_path / "weights.pth"
    torch.save({name: value for name, value in state.items() if not name.startswith("blocks.1.mlp.fc1")}, path)
    with pytest.raises(CheckpointError, match=r"of whose backbone they are 85%: blocks\.1\.mlp\.fc1\.weight, "):
        load_initial(build_network(VIT, 14), read_start(path))
    torch.save({name: value for name, value in state.items() if name != "norm.bias"}, path)
    assert "; fresh: norm.bias, head.weight, head.bias" in load_initial(build_network(VIT, 14), read_start(path))

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


def as_mae(state: State) -> dict[str, object]:
    decoder = {f"decoder_blocks.{block}.norm1.weight": torch.ones(8) for block in range(8)}
    more = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 197, 8)} | decoder
    encoder = {name.replace("fc_norm.", "norm."): value for name, value in without_head(state).items()}
    return {"model": encoder | more, "epoch": 799, "args": argparse.Namespace(blr=1.5e-4)}


def as_dinov2(state: State) -> dict[str, object]:
    """Of training, in chunks of blocks, with student and teacher."""
    chunked = {re.sub(r"blocks\.(\d+)", r"blocks.0.\1", name): v for name, v in without_head(state).items()}
    chunked["mask_token"] = torch.zeros(1, 96)
    both = {
        f"{side}.backbone.{name}": v + (side == "student")
        for side in ("student", "teacher")
        for name, v in chunked.items()
    }
    return {"model": both | {"teacher.dino_head.last_layer.weight_g": torch.ones(5, 1)}, "iteration": 1}


def as_transformers(state: State) -> dict[str, object]:
    """Of `Dinov2WithRegistersModel`, whose class token has no position of its own in timm."""
    renamed: State = {"embeddings.mask_token": torch.zeros(1, 96)}
    names = (
        ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
        ("blocks.", "encoder.layer."),
        (".attn.proj.", ".attention.output.dense."),
        (".ls1.gamma", ".layer_scale1.lambda1"),
        (".ls2.gamma", ".layer_scale2.lambda1"),
    )
    for name, value in without_head(state).items():
        new = re.sub(r"^norm\.", "layernorm.", name)
        for ours, theirs in names:
            new = new.replace(ours, theirs)
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[new.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            renamed[new] = value
    position = torch.full_like(state["pos_embed"][:, :1], 0.25)
    renamed["embeddings.register_tokens"] = renamed.pop("reg_token")
    renamed["embeddings.cls_token"] = renamed.pop("cls_token") - position
    renamed["embeddings.position_embeddings"] = torch.cat([position, renamed.pop("pos_embed")], dim=1)
    return dict(renamed)


def as_eva(state: State) -> dict[str, object]:
    renamed: State = {"mask_token": torch.zeros(1, 1, 8), "lm_head.weight": torch.ones(4, 8)}
    names = (("fc_norm.", "norm."), ("mlp.norm.", "mlp.ffn_ln."), ("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"))
    split = any("fc1_g" in name for name in state)
    for name, value in without_head(state).items():
        for ours, theirs in (*names, ("mlp.fc1.", "mlp.w12."), ("mlp.fc2", "mlp.w3")):
            name = name.replace(ours, theirs)
        renamed[name.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias") if split else name] = value
    return {"module": renamed | {"rope.freqs_cos": torch.ones(196, 64)}}


def as_open_clip(state: State) -> dict[str, object]:
    text = {
        f"text.transformer.encoder.layer.{layer}.attention.output.dense.weight": torch.ones(2, 2) for layer in range(99)
    }
    tower = {f"visual.trunk.{name}": value for name, value in without_head(state).items()}
    return {**text, **tower, "visual.head.proj.weight": torch.ones(512, 192), "logit_scale": torch.ones(())}


def as_ark(state: State) -> dict[str, object]:
    """Of the first timm's Swin, which downsamples at the end of a stage."""
    old = {
        re.sub(r"layers\.(\d)\.downsample", lambda stage: f"layers.{int(stage[1]) - 1}.downsample", name): value
        for name, value in without_head(state).items()
    }
    more = {"omni_heads.0.weight": torch.ones(14, 8), "layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    return {"teacher": {f"module.{name}": value for name, value in (old | more).items()}, "epoch": 199}


def as_lightning(state: State) -> dict[str, object]:
    weights = {f"model._orig_mod.vit.{name}": value for name, value in without_head(state).items()}
    return {"state_dict": weights | {"loss.weight": torch.ones(14)}, "hyper_parameters": {"lr": 1e-4}}


def without_head(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


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

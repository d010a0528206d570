"""Every parameter of the published 14B checkpoint has a place here, and every parameter here is published."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flashtalk_rt.config import DiTConfig, VAEConfig
from flashtalk_rt.errors import CheckpointError
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.encoder_names import clip_part, clip_settings, umt5_part, umt5_settings
from flashtalk_rt.modules.encoders import ClipImageEncoder, Umt5TextEncoder, clip_config, umt5_config
from flashtalk_rt.modules.vae import VAE
from flashtalk_rt.modules.weights import Part, StateSource, check

DEFAULT = Path(__file__).parents[2] / "shared" / "golden"
FOLDERS = (Path(os.environ.get("FLASHTALK_GOLDEN", DEFAULT)), DEFAULT)
# A folder of further golden cases need not repeat it.
MANIFEST = next((p for f in FOLDERS if (p := f / "checkpoint-manifest.json").is_file()), FOLDERS[0])
DIT, VAE_FILE, CLIP, UMT5 = (
    "dit (safetensors shards)",
    "Wan2.1_VAE.pth",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
)


def published(name: str) -> StateSource:
    """The manifest's entry of `name` as tensors without data."""
    manifest: dict[str, dict[str, list[int]]] = json.loads(MANIFEST.read_text())
    shapes = next(value for key, value in manifest.items() if key.startswith(name))
    return StateSource(name, {k: torch.empty(shape, device="meta") for k, shape in shapes.items()})


def clip() -> tuple[nn.Module, Part]:
    source = published(CLIP)
    settings = clip_settings(source)
    return ClipImageEncoder(clip_config(settings)), clip_part(source, settings["layers"])


def umt5() -> tuple[nn.Module, Part]:
    source = published(UMT5)
    return Umt5TextEncoder(umt5_config(umt5_settings(source)), None, 512), umt5_part(source)


BUILDERS: dict[str, Any] = {
    DIT: lambda: (DiT(DiTConfig()), Part(published(DIT))),
    VAE_FILE: lambda: (VAE(VAEConfig()), Part(published(VAE_FILE))),
    CLIP: clip,
    UMT5: umt5,
}


def pair(name: str) -> tuple[nn.Module, Part]:
    with torch.device("meta"):
        module, part = BUILDERS[name]()
    return module, part


@pytest.mark.parametrize("name", BUILDERS)
def test_every_published_parameter_is_loaded_or_unused_for_a_reason(name: str) -> None:
    module, part = pair(name)
    wanted = check(module, part)
    parameters = {target: tuple(p.shape) for target, p in module.named_parameters()}

    # Every target once, each from exactly the rows that are its share of a published tensor.
    targets = [target for uses in wanted.values() for target, _ in uses]
    assert sorted(targets) == sorted(parameters)
    for uses in wanted.values():
        assert sorted(take.part for _, take in uses) == list(range(uses[0][1].parts))
        for target, take in uses:
            assert take.shape == part.source.shapes[take.name]
            whole = torch.Size(take.shape).numel()
            assert whole == take.parts * torch.Size(parameters[target]).numel()

    unused = sorted(set(part.source.shapes) - set(wanted))
    reasons = {n: [u.reason for u in part.unused if n.startswith(u.prefix)] for n in unused}
    assert all(len(found) == 1 and found[0] for found in reasons.values()), reasons
    expected = []
    if name == CLIP:
        block = [n for n in part.source.shapes if n.startswith("visual.transformer.31.")]
        assert len(block) == 12
        expected = sorted([*block, "visual.head", "visual.post_norm.bias", "visual.post_norm.weight"])
    assert unused == expected


def test_the_manifest_has_these_four_files_and_their_known_sizes() -> None:
    manifest = json.loads(MANIFEST.read_text())
    assert len(manifest) == len(BUILDERS)
    assert {name: len(published(name).shapes) for name in BUILDERS} == {
        DIT: 1633,
        VAE_FILE: 194,
        CLIP: 392,
        UMT5: 242,
    }


def test_the_sizes_read_off_the_published_files() -> None:
    assert clip_settings(published(CLIP)) == {
        "image_size": 224,
        "patch_size": 14,
        "dim": 1280,
        "heads": 16,
        "layers": 32,
        "mlp_ratio": 4.0,
        "activation": "gelu",
        "norm_eps": 1e-5,
    }
    assert umt5_settings(published(UMT5)) == {
        "vocab": 256384,
        "dim": 4096,
        "dim_attn": 4096,
        "dim_ffn": 10240,
        "heads": 64,
        "layers": 24,
        "num_buckets": 32,
    }


@pytest.mark.parametrize("name", BUILDERS)
def test_a_lost_an_added_and_a_changed_parameter_are_each_named(name: str) -> None:
    module, part = pair(name)
    taken = next(iter(check(module, part)))
    state = {k: torch.empty(shape, device="meta") for k, shape in part.source.shapes.items()}

    def problem(changed: dict[str, torch.Tensor]) -> str:
        with pytest.raises(CheckpointError) as error:
            check(module, Part(StateSource("x.pth", changed), part.rename, part.unused))
        return str(error.value)

    assert problem({k: v for k, v in state.items() if k != taken}) == f"x.pth: missing: {taken}"
    assert problem({**state, "added.weight": torch.empty(1)}) == "x.pth: unexpected: added.weight"
    wrong = problem({**state, taken: torch.empty(3, 7)})
    assert wrong == f"x.pth: wrong shape: {taken} is [3, 7] where {list(state[taken].shape)} is expected"

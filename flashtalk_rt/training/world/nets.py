"""The toy's networks: their sizes, and how a training run keeps them between its commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ...config import DiTConfig, StreamConfig, VAEConfig, from_mapping
from ...errors import CheckpointError
from ...modules.dit import DiT
from ...modules.vae import VAE

# The same classes as the 14B model, small enough for two CPU cores and one GPU for minutes.
TOY_VAE = VAEConfig(dim=16, num_res_blocks=1)
TOY_DIT = DiTConfig(
    dim=256,
    ffn_dim=1024,
    num_heads=4,
    num_layers=6,
    freq_dim=128,
    text_dim=16,
    text_len=4,
    image_dim=27,
    audio_blocks=4,
    audio_dim=40,
    intermediate_dim=192,
    output_dim=128,
    context_tokens=8,
)
# An undistilled flow model is integrated, not renoised; it needs no colour matching (measured).
TOY_STREAM = StreamConfig(
    height=96,
    width=96,
    steps=8,
    shift=5.0,
    sampler="adams_bashforth",
    color_strength=0.0,
)


def save_net(net: DiT | VAE, path: Path) -> None:
    """Write weights and configuration as one safetensors file."""
    metadata = {"config": json.dumps(dataclasses.asdict(net.config))}
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(path), metadata)


def load_vae(path: Path, device: torch.device) -> VAE:
    """Read a VAE that `save_net` wrote.  CheckpointError if it is missing or something else."""
    vae = VAE(from_mapping(VAEConfig, _config(path), str(path)))
    vae.load_state_dict(load_file(str(path)))
    return vae.to(device).eval().requires_grad_(False).channels_last()


def load_dit(path: Path, device: torch.device) -> DiT:
    """Read a DiT that `save_net` wrote.  CheckpointError if it is missing or something else."""
    dit = DiT(from_mapping(DiTConfig, _config(path), str(path)))
    dit.load_state_dict(load_file(str(path)))
    return dit.to(device)


def _config(path: Path) -> dict[str, object]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; run the training command that writes it first")
    try:
        with safe_open(str(path), framework="pt") as file:
            config: dict[str, object] = json.loads(file.metadata()["config"])
            return config
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} was not written by this training ({error}); move it away") from error

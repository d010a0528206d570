"""The published checkpoint folder: which files it has, and what their names and shapes say.

Sizes are read from the files (and the DiT's from its config.json), so that a folder of any size in the same
layout loads; what no shape tells, such as CLIP's head width, is the published system's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import DiTConfig, StreamConfig, VAEConfig, from_mapping
from ..errors import CheckpointError
from .encoder_names import clip_part, clip_settings, size, umt5_part, umt5_settings, wav2vec2_part
from .encoders import WAV2VEC2_SETTINGS, wav2vec2_config
from .weights import Checkpoint, Part, SafetensorsFiles, Source, open_pth

VAE_FILE = "Wan2.1_VAE.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = "google/umt5-xxl"
AUDIO_FOLDER = "chinese-wav2vec2-base"

# Keys of the DiT's config.json that only name the class that wrote it, or matter before training alone.
_IGNORED = {"_class_name", "_diffusers_version", "_name_or_path", "model_type", "weight_init"}
# Keys for which this code computes one thing only.
_FIXED = {
    "patch_size": [1, 2, 2],
    "window_size": [-1, -1],
    "qk_norm": True,
    "cross_attn_norm": True,
    "vae_scale": 4,
    "norm_input_visual": True,
    "norm_output_audio": True,
}


def read_published(folder: Path) -> Checkpoint:
    """What the folder holds, from configs and headers.

    CheckpointError names every missing file at once, and says which file is damaged, refused or at odds with
    another.
    """
    dit_files, audio = _files(folder)
    dit_source = SafetensorsFiles(dit_files)
    vae_source, clip_source, text_source = (open_pth(folder / f) for f in (VAE_FILE, CLIP_FILE, TEXT_FILE))
    audio_file = _audio_weights(audio)
    is_pickle = audio_file.suffix == ".bin"
    audio_source: Source = open_pth(audio_file) if is_pickle else SafetensorsFiles([audio_file])

    dit = dit_config(_read_json(folder / "config.json"), str(folder / "config.json"))
    z_dim = size(vae_source, "conv2.weight", 0)
    vae = VAEConfig(dim=size(vae_source, "encoder.conv1.weight", 0), z_dim=z_dim)
    clip = clip_settings(clip_source)
    text = umt5_settings(text_source)
    audio_settings = wav2vec2_settings(_read_json(audio / "config.json"))
    for what, key, expected, found in (
        ("text encoder's width", "text_dim", dit.text_dim, text["dim"]),
        ("image encoder's width", "image_dim", dit.image_dim, clip["dim"]),
        ("audio encoder's width", "audio_dim", dit.audio_dim, audio_settings["hidden_size"]),
        ("audio encoder's blocks", "audio_blocks", dit.audio_blocks, audio_settings["num_hidden_layers"]),
        ("VAE's latent channels", "out_dim", dit.out_dim, z_dim),
    ):
        if expected != found:
            raise CheckpointError(
                f"{folder}: the {what} ({found}) is not the DiT's {key} ({expected}); the files do not fit"
            )
    return Checkpoint(
        where=str(folder),
        dit=dit,
        vae=vae,
        stream=StreamConfig(),
        label="",
        min_portrait_psnr_db=0.0,
        encoders={
            "audio_encoder": {"kind": "wav2vec2", **audio_settings},
            "image_encoder": {"kind": "clip", **clip},
            "text_encoder": {"kind": "umt5", **text},
        },
        parts={
            "dit": Part(dit_source),
            "vae": Part(vae_source),
            "audio_encoder": wav2vec2_part(audio_source),
            "image_encoder": clip_part(clip_source, clip["layers"]),
            "text_encoder": umt5_part(text_source),
        },
        tokenizer=folder / TOKENIZER,
    )


def dit_config(values: Mapping[str, Any], where: str) -> DiTConfig:
    """The DiT's published config.json; a key or value that this code does not know raises CheckpointError."""
    values = {key: value for key, value in values.items() if key not in _IGNORED}
    for key, only in _FIXED.items():
        value = values.pop(key, only)
        if value != only:
            raise CheckpointError(f"{where}: {key} is {value}, but only {only} is supported")
    return from_mapping(DiTConfig, {**dataclasses.asdict(DiTConfig()), **values}, where)


def _files(folder: Path) -> tuple[list[Path], Path]:
    """The DiT's files and the audio encoder's folder; every file that is missing is named."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    single = ("config.json", VAE_FILE, TEXT_FILE, CLIP_FILE)
    missing = [name for name in single if not (folder / name).is_file()]

    shards = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index}: no weight_map; get the file again")
        # Names only: an index cannot point outside its folder.
        shards = [folder / Path(name).name for name in sorted(set(map(str, weight_map.values())))]
        missing += [path.name for path in shards if not path.is_file()]
    if not shards:
        missing.append("diffusion_pytorch_model*.safetensors")

    if not any((folder / TOKENIZER / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        missing.append(f"{TOKENIZER}/tokenizer.json (or spiece.model)")

    beside, inside = folder.resolve().parent / AUDIO_FOLDER, folder / AUDIO_FOLDER
    audio = beside if beside.is_dir() and not inside.is_dir() else inside
    if not audio.is_dir():
        missing.append(f"{AUDIO_FOLDER}/ (here or beside)")
    else:
        if not (audio / "config.json").is_file():
            missing.append(f"{AUDIO_FOLDER}/config.json")
        if not _audio_weights(audio).is_file():
            missing.append(f"{AUDIO_FOLDER}/pytorch_model.bin (or model.safetensors)")
    if missing:
        raise CheckpointError(f"{folder}: missing {', '.join(missing)}")
    return shards, audio


def _audio_weights(audio: Path) -> Path:
    plain = audio / "model.safetensors"
    return plain if plain.is_file() else audio / "pytorch_model.bin"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); get the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def wav2vec2_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the encoder's output depends on, from a config.json; missing keys at transformers' defaults."""
    config = wav2vec2_config(values)
    return {key: getattr(config, key) for key in WAV2VEC2_SETTINGS}

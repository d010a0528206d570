"""Our one checkpoint layout, written by `flashtalk convert` and by training, and shipped in the package.

    flashtalk.json                   format, label, dit, vae, stream, encoders
    dit-00001-of-0000N.safetensors   the DiT, at most SHARD_BYTES a file
    vae.safetensors
    {audio,image,text}_encoder.safetensors, tokenizer/    where the encoders have weights

Names are those of the modules' state dicts; safetensors' format: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import DiTConfig, StreamConfig, VAEConfig, from_mapping
from ..errors import CheckpointError, InputError, OutputError
from .dit import DiT
from .model import Model
from .toy_encoders import MelAudioEncoder, NullTextEncoder, PatchImageEncoder
from .weights import (
    ENCODER_DTYPES,
    Checkpoint,
    Part,
    SafetensorsFiles,
    StateSource,
    build,
    parameters_of,
    read_checkpoint,
)

LAYOUT_FILE = "flashtalk.json"
FORMAT = 1
SHARD_BYTES = 4 * 10**9
ENCODERS = ("audio_encoder", "image_encoder", "text_encoder")

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", ops.FP8: "F8_E4M3"}


def convert(
    folder: str | Path, out: str | Path, dtype: torch.dtype = torch.bfloat16, *, fp8: bool = False
) -> None:
    """Rewrite a checkpoint (published, or converted before) in our layout as the new folder `out`.

    The DiT is stored in `dtype`, its large projections in float8 if `fp8` says so, the text encoder in
    bfloat16, the rest in float32. One tensor at a time is in memory. `out` appears under its name only when
    complete. InputError: `out` exists and is not empty, or its parent does not exist, or the checkpoint is
    float8 already and should not be. OutputError: the disk is too small or full, or writing failed.
    CheckpointError: as `weights.load`.
    """
    dtypes = {"dit": dtype, "vae": torch.float32, **ENCODER_DTYPES}
    write_converted(read_checkpoint(folder), Path(out), dtypes, fp8=fp8)


def save_converted(model: Model, out: str | Path, dtype: torch.dtype) -> None:
    """Write a model with the toy's encoders as a new folder in our layout, DiT and VAE in `dtype`.

    This is how training writes the embedded folder. Errors as `convert`; other encoders: ValueError.
    """
    audio, image, text = model.audio_encoder, model.image_encoder, model.text_encoder
    if not (
        isinstance(audio, MelAudioEncoder)
        and isinstance(image, PatchImageEncoder)
        and isinstance(text, NullTextEncoder)
    ):
        raise ValueError("save_converted writes models with the toy encoders; use `convert` for others")
    checkpoint = Checkpoint(
        where="the model",
        dit=model.dit.config,
        vae=model.vae.config,
        stream=model.stream,
        label=model.label,
        min_portrait_psnr_db=model.min_portrait_psnr_db,
        encoders={
            "audio_encoder": {
                "kind": "toy",
                "sample_rate_hz": model.stream.sample_rate_hz,
                "fps": model.stream.fps,
                "mels": audio.mels,
                "subframes": audio.subframes,
            },
            "image_encoder": {"kind": "toy", "grid": image.grid, "patch": image.patch},
            "text_encoder": {"kind": "toy", "dim": text.dim},
        },
        parts={
            "dit": Part(StateSource("the DiT", model.dit.state_dict())),
            "vae": Part(StateSource("the VAE", model.vae.state_dict())),
        },
    )
    write_converted(checkpoint, Path(out), {"dit": dtype, "vae": dtype})


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The JSON objects of flashtalk.json."""

    format: int
    label: str
    min_portrait_psnr_db: float
    fp8: bool
    dit: dict[str, Any]
    vae: dict[str, Any]
    stream: dict[str, Any]
    encoders: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Encoders:
    audio_encoder: dict[str, Any]
    image_encoder: dict[str, Any]
    text_encoder: dict[str, Any]


def read_converted(folder: Path) -> Checkpoint:
    """What a folder in our layout holds. CheckpointError names every missing file at once, or the first
    setting that cannot be."""
    path = folder / LAYOUT_FILE
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); convert it again") from error
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}, but this version reads {FORMAT}; convert it again")
    layout = from_mapping(_Layout, values, str(path))
    dit = from_mapping(DiTConfig, layout.dit, f"{path}: dit")
    vae = from_mapping(VAEConfig, layout.vae, f"{path}: vae")
    stream = from_mapping(StreamConfig, layout.stream, f"{path}: stream")
    encoders = vars(from_mapping(_Encoders, layout.encoders, f"{path}: encoders"))
    _check_toys(encoders, dit, stream, str(path))
    weighty = [name for name in ENCODERS if encoders[name].get("kind") != "toy"]

    files = {name: [folder / f"{name}.safetensors"] for name in ("vae", *weighty)}
    files["dit"] = _dit_shards(folder)
    missing = [path.name for paths in files.values() for path in paths if not path.is_file()]
    tokenizer = folder / "tokenizer" if "text_encoder" in weighty else None
    if tokenizer is not None and not tokenizer.is_dir():
        missing.append("tokenizer/")
    if missing:
        raise CheckpointError(f"{folder}: missing {', '.join(missing)}")
    return Checkpoint(
        where=str(path),
        dit=dit,
        vae=vae,
        stream=stream,
        label=layout.label,
        min_portrait_psnr_db=layout.min_portrait_psnr_db,
        encoders=encoders,
        parts={name: Part(SafetensorsFiles(paths)) for name, paths in files.items()},
        tokenizer=tokenizer,
        fp8=layout.fp8,
    )


def _check_toys(
    encoders: Mapping[str, Mapping[str, Any]], dit: DiTConfig, stream: StreamConfig, where: str
) -> None:
    """The other settings leave a toy encoder no choice but its grid."""
    grid = encoders["image_encoder"].get("grid")
    needed: dict[str, dict[str, Any]] = {
        "audio_encoder": {
            "sample_rate_hz": stream.sample_rate_hz,
            "fps": stream.fps,
            "mels": dit.audio_dim,
            "subframes": dit.audio_blocks,
        },
        "image_encoder": {
            "grid": grid if grid in range(1, 257) else 16,
            "patch": math.isqrt(dit.image_dim // 3),
        },
        "text_encoder": {"dim": dit.text_dim},
    }
    for name, settings in needed.items():
        found = {key: value for key, value in encoders[name].items() if key != "kind"}
        if encoders[name].get("kind") == "toy" and found != settings:
            raise CheckpointError(f"{where}: {name} is {found}; the dit and stream settings want {settings}")


def _dit_shards(folder: Path) -> list[Path]:
    """Every shard that there should be, found or not."""
    for path in sorted(folder.glob("dit-*-of-*.safetensors")):
        if match := re.fullmatch(r"dit-\d+-of-(\d+)\.safetensors", path.name):
            return [folder / _shard_name(i, int(match[1])) for i in range(int(match[1]))]
    return [folder / _shard_name(0, 1)]


def _shard_name(index: int, count: int) -> str:
    return f"dit-{index + 1:05d}-of-{count:05d}.safetensors"


def write_converted(
    checkpoint: Checkpoint, out: Path, dtypes: Mapping[str, torch.dtype], *, fp8: bool = False
) -> None:
    """Write `checkpoint` as the new folder `out`, part `name` in dtypes[name], the DiT's large projections
    in float8 if `fp8` says so. Errors as `convert`; InputError too if they are float8 already and should
    not be."""
    target = Path(os.path.realpath(out))  # of a link, so that `rename` can take its place
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; name a new one")
    if checkpoint.fp8 and not fp8:
        raise InputError(
            f"{checkpoint.parts['dit'].source.where} is float8 already; convert the original, or ask for fp8"
        )
    modules = {name: build(checkpoint, name) for name in checkpoint.parts}
    written = {
        name: _Stored(module, checkpoint.parts[name], dtypes[name], fp8 and name == "dit")
        for name, module in modules.items()
    }
    plans = {name: _shards(name, part) for name, part in written.items()}
    needed_bytes = sum(size for shards in plans.values() for _, size in shards)
    parent = target.parent
    if not os.path.isdir(parent):
        raise InputError(f"{parent}: no such folder to write {out.name} in")
    free_bytes = shutil.disk_usage(parent).free
    if needed_bytes > free_bytes:
        raise OutputError(
            f"{out}: needs {needed_bytes:,} bytes, but its disk has {free_bytes:,} free; make room, "
            "or name a folder on another disk"
        )

    partial = parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir()
        for name, shards in plans.items():
            values = written[name].values()
            for index, (entries, _) in enumerate(shards):
                file = _shard_name(index, len(shards)) if name == "dit" else f"{name}.safetensors"
                _write_safetensors(partial / file, entries, islice(values, len(entries)))
        if checkpoint.tokenizer is not None:
            shutil.copytree(checkpoint.tokenizer, partial / "tokenizer")
        (partial / LAYOUT_FILE).write_text(json.dumps(_layout(checkpoint, fp8), indent=1) + "\n")
        partial.rename(target)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{out}: could not be written ({reason}); nothing was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _layout(checkpoint: Checkpoint, fp8: bool) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "label": checkpoint.label,
        "min_portrait_psnr_db": checkpoint.min_portrait_psnr_db,
        "fp8": fp8,
        "dit": dataclasses.asdict(checkpoint.dit),
        "vae": dataclasses.asdict(checkpoint.vae),
        "stream": dataclasses.asdict(checkpoint.stream),
        "encoders": {name: dict(settings) for name, settings in checkpoint.encoders.items()},
    }


Entries = list[tuple[str, list[int], torch.dtype]]


class _Stored:
    """One network as it is stored: in `dtype`, the DiT's large projections as float8 and their scales."""

    def __init__(self, module: nn.Module, part: Part, dtype: torch.dtype, fp8: bool) -> None:
        self._module, self._part, self._dtype = module, part, dtype
        large = module.large_projections() if fp8 and isinstance(module, DiT) else []
        names = {id(layer): name for name, layer in module.named_modules()}
        self._fp8 = {f"{names[id(layer)]}.weight" for layer in large}

    def entries(self) -> Iterator[tuple[str, list[int], torch.dtype]]:
        """What `values` yields, from the shapes alone."""
        for name, value in parameters_of(self._module, self._part):
            shape = list(value.shape)
            if name in self._fp8 and value.dtype != ops.FP8:
                yield name, shape, ops.FP8
                yield f"{name}_scale", [shape[0], 1], torch.float32
            else:
                yield name, shape, self._kept(name, value)

    def values(self) -> Iterator[Tensor]:
        """Every tensor to write, in the order of `entries`."""
        for name, value in parameters_of(self._module, self._part):
            if name in self._fp8 and value.dtype != ops.FP8:
                yield from ops.quantize(value)
            else:
                yield value.to("cpu", self._kept(name, value))

    def _kept(self, name: str, value: Tensor) -> torch.dtype:
        """float8 and its scales mean nothing in another format."""
        return value.dtype if value.dtype == ops.FP8 or name.endswith("weight_scale") else self._dtype


def _shards(name: str, part: _Stored) -> list[tuple[Entries, int]]:
    """[(entries, bytes)]: parameters in their source's order, the DiT's in files of at most SHARD_BYTES."""
    limit = SHARD_BYTES if name == "dit" else math.inf
    shards: list[tuple[Entries, int]] = []
    for entry in part.entries():
        size = math.prod(entry[1]) * entry[2].itemsize
        if not shards or shards[-1][1] + size > limit:
            shards.append(([], 0))
        entries, used = shards[-1]
        entries.append(entry)
        shards[-1] = (entries, used + size)
    return shards


def _write_safetensors(path: Path, entries: Entries, values: Iterator[Tensor]) -> None:
    """A .safetensors file, one tensor at a time: the library's own writer wants all of them in memory.

    Format: the header's length (8 bytes, little-endian), a JSON header padded with spaces to a multiple of
    8 bytes, the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, dtype in entries:
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for value in values:
            raw = value.contiguous().reshape(-1).view(torch.uint8)
            file.write(raw.numpy().data)
            del raw, value  # before the next one is made: one tensor at a time, not two
        file.flush()
        os.fsync(file.fileno())

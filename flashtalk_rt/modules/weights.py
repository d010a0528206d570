"""Reading weights: files of named tensors, read one tensor at a time, put straight into modules.

A `Checkpoint` says what a model consists of and where its tensors are; `published.py` and `convert.py` make
one from a folder. Nothing is read until every name and shape has been checked, and then never more than one
tensor is on the host: 38 GB of weights load to a GPU on a machine with far less memory.
"""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors
import torch
from torch import Tensor, nn

from .. import ops
from ..config import DiTConfig, StreamConfig, VAEConfig
from ..errors import CheckpointError, InputError
from .device import usable_device
from .dit import DiT
from .model import Model
from .toy_encoders import MelAudioEncoder, NullTextEncoder, PatchImageEncoder
from .vae import VAE

EMBEDDED = Path(__file__).resolve().parent.parent / "embedded"

# The precisions that the published encoders run in; see `load`.
ENCODER_DTYPES = {
    "audio_encoder": torch.float32,
    "image_encoder": torch.float32,
    "text_encoder": torch.bfloat16,
}

Shape = tuple[int, ...]


class Source(Protocol):
    """Named tensors on disk or in memory."""

    @property
    def where(self) -> str:
        """The file or files, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, Shape]: ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, in the order of `shapes`; a view of the file, valid until the next one."""
        ...


class SafetensorsFiles:
    """One or more .safetensors files that hold one network between them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.where = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent}/ ({len(paths)} files)"
        self._paths = paths
        self.shapes: dict[str, Shape] = {}
        for path in paths:
            with _open_safetensors(path) as file:
                for name in sorted(file.keys()):
                    if name in self.shapes:
                        raise CheckpointError(f"{path}: {name} is in another file of this folder too")
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for path in self._paths:
            with _open_safetensors(path) as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)


def _open_safetensors(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}); get the file again") from error


class StateSource:
    """Tensors in memory, a state dict say."""

    def __init__(self, where: str, state: Mapping[str, Tensor]) -> None:
        self.where = where
        self._state = state
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._state.items()


def open_pth(path: Path) -> StateSource:
    """A .pth or .bin file as views of the mapped file; only plain tensors are ever unpickled.

    Anything else in it raises CheckpointError, as do a truncated file and one from before torch 1.6.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"{path}: truncated, or not a file that torch.save writes; get the file again"
        ) from error
    if any(entry.endswith("/constants.pkl") for entry in entries):
        raise _not_plain(path, "a TorchScript program")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise _not_plain(path, "objects that would run code when read") from error
    except (RuntimeError, OSError, KeyError, ValueError, EOFError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged ({reason}); get the file again") from error
    if not isinstance(state, dict):
        raise _not_plain(path, f"a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise _not_plain(path, f"a {type(value).__name__} under {name!r}")
    return StateSource(str(path), state)


def _not_plain(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused, it holds {found} where only named tensors are allowed; get the published file, or "
        "save the plain state dict again with torch.save where you trust this one"
    )


class Take(NamedTuple):
    """Where one parameter comes from: rows `part` of `parts` of the tensor `name`, which has `shape`."""

    name: str
    shape: Shape
    part: int = 0
    parts: int = 1


Rename = Callable[[str, Shape], Take]
"""A module's parameter, by name and shape, to what it is taken from."""


class Unused(NamedTuple):
    """Tensors of a file that no module wants, by the start of their names, and why."""

    prefix: str
    reason: str


def same_name(name: str, shape: Shape) -> Take:
    """The file uses the module's own names."""
    return Take(name, shape)


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one network's weights are, and under which names."""

    source: Source
    rename: Rename = same_name
    unused: tuple[Unused, ...] = ()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model before it is loaded.

    `where` names its file or folder in messages. `encoders` maps audio_encoder, image_encoder and
    text_encoder to {"kind": ..., and its settings}; `parts` maps dit, vae and those encoders that have
    weights to where these are.
    """

    where: str
    dit: DiTConfig
    vae: VAEConfig
    stream: StreamConfig
    label: str
    min_portrait_psnr_db: float
    encoders: Mapping[str, Mapping[str, Any]]
    parts: Mapping[str, Part]
    tokenizer: Path | None = None
    fp8: bool = False  # the DiT's large projections are stored as float8 with a scale a row


def load(
    source: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Model:
    """A model, ready to stream, every weight on `device`, none requiring a gradient.

    source  "embedded" (the toy model inside the package), a folder written by `flashtalk convert`, or a
            folder in the published layout. A folder of yours called embedded is "./embedded".
    device  "cpu", "cuda" or "cuda:N"; None: CUDA where there is one, else the CPU.
    dtype   of the DiT. None: bfloat16 on CUDA, float32 elsewhere. The VAE is in float32 until an engine
            converts it. The text encoder stays in bfloat16, as published; the other two encoders are small
            and run in float32.

    Anything missing, damaged or of the wrong shape raises CheckpointError before a weight is read, and a
    device that is not there or another dtype InputError.
    """
    device = usable_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype is {dtype!r}; use torch.float32, torch.bfloat16 or torch.float16, or None")
    return load_checkpoint(read_checkpoint(source), device, dtype)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """What `load` would load, from the headers of its files alone; errors as `load`, shapes aside."""
    folder = EMBEDDED if source == "embedded" else Path(source)
    # Both imports wait: `convert` builds on this module, and `published` brings transformers, which takes
    # seconds that the embedded model should not cost.
    from .convert import LAYOUT_FILE, read_converted

    try:
        if not folder.is_dir():
            raise CheckpointError(
                f'{folder}: no such folder; give a published or converted checkpoint folder, or "embedded"'
            )
        if (folder / LAYOUT_FILE).is_file():
            return read_converted(folder)
        from .published import read_published

        return read_published(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def load_checkpoint(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Model:
    """Build every network on the meta device, check every name and shape, then fill one tensor at a time."""
    # The engine rounds the VAE, once: to bfloat16 and then to float16 would round twice.
    dtypes = {"dit": dtype, "vae": torch.float32, **ENCODER_DTYPES}
    networks: dict[str, Any] = {name: build(checkpoint, name) for name in checkpoint.parts}
    for name, part in checkpoint.parts.items():
        check(networks[name], part)
    for name, part in checkpoint.parts.items():
        fill(networks[name], part, device, dtypes[name])
    for name in checkpoint.encoders:
        if name not in networks:
            networks[name] = build(checkpoint, name)
    return Model(
        **networks,
        stream=checkpoint.stream,
        label=checkpoint.label,
        min_portrait_psnr_db=checkpoint.min_portrait_psnr_db,
    )


def build(checkpoint: Checkpoint, name: str) -> Any:
    """One network of `checkpoint` by its name: a module with its parameters on the meta device, or a toy
    encoder, which has none. CheckpointError for settings that make no encoder.
    """
    try:
        return _build(checkpoint, name)
    except CheckpointError:
        raise
    except Exception as error:  # every encoder's library checks its settings in its own way
        if name not in checkpoint.encoders:  # settings of ours were checked when they were read
            raise
        settings = checkpoint.encoders[name]
        raise CheckpointError(f"{checkpoint.where}: {name} cannot be made of {settings}: {error}") from error


def _build(checkpoint: Checkpoint, name: str) -> Any:
    with torch.device("meta"):
        if name == "dit":
            dit = DiT(checkpoint.dit)
            if checkpoint.fp8:
                for layer in dit.large_projections():
                    layer.hold(ops.quantize(layer.weight))
            return dit
        if name == "vae":
            return VAE(checkpoint.vae)
    settings = dict(checkpoint.encoders[name])
    kind = settings.pop("kind")
    if kind == "toy":
        toys = {"audio_encoder": MelAudioEncoder, "image_encoder": PatchImageEncoder}
        return toys.get(name, NullTextEncoder)(**settings)
    from . import encoders  # transformers: seconds that the embedded model should not cost

    with torch.device("meta"):
        if kind == "wav2vec2":
            return encoders.Wav2Vec2AudioEncoder(encoders.wav2vec2_config(settings))
        if kind == "clip":
            return encoders.ClipImageEncoder(encoders.clip_config(settings))
        if kind == "umt5" and checkpoint.tokenizer is not None:
            tokenize = encoders.folder_tokenizer(checkpoint.tokenizer)
            return encoders.Umt5TextEncoder(encoders.umt5_config(settings), tokenize, checkpoint.dit.text_len)
    raise CheckpointError(
        f"{checkpoint.where}: {name} is of unknown kind {kind!r}; another version wrote it, convert it again"
    )


def check(module: nn.Module, part: Part) -> dict[str, list[tuple[str, Take]]]:
    """Hold the part's names and shapes against the module's parameters; nothing is read.

    Returns {name in the file: [(parameter, what of it)]}. Missing, unexpected and misshapen tensors raise
    CheckpointError, which names them.
    """
    shapes = part.source.shapes
    wanted: dict[str, list[tuple[str, Take]]] = {}
    wrong: dict[str, None] = {}
    for target, parameter in module.named_parameters():
        take = part.rename(target, tuple(parameter.shape))
        wanted.setdefault(take.name, []).append((target, take))
        found = shapes.get(take.name, take.shape)
        if found != take.shape:
            wrong[f"{take.name} is {list(found)} where {list(take.shape)} is expected"] = None
    missing = [name for name in wanted if name not in shapes]
    prefixes = tuple(unused.prefix for unused in part.unused)
    unexpected = [name for name in shapes if name not in wanted and not name.startswith(prefixes)]
    problems = [
        f"{what} {_some(names)}"
        for what, names in (("missing:", missing), ("unexpected:", unexpected), ("wrong shape:", list(wrong)))
        if names
    ]
    if problems:
        raise CheckpointError(f"{part.source.where}: {'; '.join(problems)}")
    return wanted


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def parameters_of(module: nn.Module, part: Part) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, its value as stored) for every parameter of `module`, in the order of the file.

    The values are views of the file or of the next value: copy before going on.
    """
    wanted = check(module, part)
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    for name, tensor in part.source.tensors():
        for target, take in wanted.get(name, ()):
            if not tensor.is_floating_point():
                raise CheckpointError(f"{part.source.where}: {name} is {tensor.dtype}, not floating point")
            yield target, tensor.chunk(take.parts)[take.part].reshape(shapes[target])


def fill(module: nn.Module, part: Part, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter of `module` (on any device, meta as a rule) its value, on `device` in `dtype`.

    One tensor at a time goes from the file to its place. The module is left in evaluation mode, its
    parameters without gradient.
    """
    for target, value in parameters_of(module, part):
        owner, _, leaf = target.rpartition(".")
        # A copy even when nothing changes: a view would tie the model to a file that may be replaced.
        # float8 and its scales mean nothing in another format.
        kept = value.dtype == ops.FP8 or leaf == "weight_scale"
        copy = value.to(
            device, value.dtype if kept else dtype, copy=True, memory_format=torch.contiguous_format
        )
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(copy, requires_grad=False)
    for child in module.modules():
        for leaf, buffer in child._buffers.items():
            if buffer is not None:
                if buffer.is_meta:
                    raise RuntimeError(f"{type(child).__name__}.{leaf} is a buffer that no checkpoint fills")
                child._buffers[leaf] = buffer.to(device)
    module.eval()

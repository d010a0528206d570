"""What the tests of loading and of converting share: tensors compared, and what loading refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flashtalk_rt.errors import CheckpointError
from flashtalk_rt.modules.model import Model
from flashtalk_rt.modules.weights import load

PARTS = ("dit", "vae", "audio_encoder", "image_encoder", "text_encoder")


def state(model: Model) -> dict[str, Tensor]:
    """Every tensor of all its networks."""
    found: dict[str, Tensor] = {}
    for name in PARTS:
        network = getattr(model, name)
        if isinstance(network, nn.Module):
            found |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
    return found


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and value.device == other[name].device, name
        assert torch.equal(value, other[name]), name


def problem(source: Path) -> str:
    """The one line that loading `source` fails with."""
    with pytest.raises(CheckpointError) as error:
        load(source, "cpu", torch.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


def dit_state(folder: Path) -> dict[str, Tensor]:
    """The DiT's tensors in a published folder, as they are stored."""
    parts = [load_file(path) for path in folder.glob("diffusion*.safetensors")]
    return {name: value for part in parts for name, value in part.items()}

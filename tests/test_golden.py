"""Every published golden case in the folder FLASHTALK_GOLDEN names reproduces, by kind."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from published_encoders import clip_from_published, umt5_from_published, wav2vec2_from_published
from safetensors.torch import load_file
from torch import Tensor
from transformers import Wav2Vec2Config

from flashtalk_rt import ops
from flashtalk_rt.config import DiTConfig, Precision, StreamConfig, VAEConfig
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.model import Model
from flashtalk_rt.modules.toy_encoders import MelAudioEncoder, NullTextEncoder, PatchImageEncoder
from flashtalk_rt.modules.vae import VAE
from flashtalk_rt.runtime import Engine
from flashtalk_rt.runtime.engine import vae_dtype
from flashtalk_rt.runtime.timing import StageClock

DEFAULT = Path(__file__).parents[2] / "shared" / "golden"
FOLDER = Path(os.environ.get("FLASHTALK_GOLDEN", DEFAULT))
BOUND = 1e-4
LOOP_BOUND = 1e-3
BF16_BOUND = 2e-2

pytestmark = pytest.mark.timeout(1800)  # a case may be of any size; a longer loop takes minutes

Outputs = dict[str, Tensor]


class Case:
    """One golden case: its description, rebuilt inputs and weights, and the expected outputs."""

    def __init__(self, path: Path, recipe: ModuleType) -> None:
        self.spec: dict[str, Any] = json.loads(path.read_text())
        self.expected = load_file(path.with_suffix(".safetensors"))
        self._recipe = recipe

    def input(self, name: str, shape_of: str | None = None) -> Tensor:
        shape = self.spec["inputs"][shape_of or name]
        return torch.from_numpy(self._recipe.tensor(self.spec["seed"], name, shape))

    def weights(self, params: str = "params", seed: str = "seed") -> dict[str, Tensor]:
        state = self._recipe.weights(self.spec[seed], self.spec[params])
        return {name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}


def load_recipe() -> ModuleType:
    """The folder's own, or the published one where it holds nothing but cases."""
    own = FOLDER / "recipe.py"
    path = own if own.is_file() else DEFAULT / own.name
    spec = importlib.util.spec_from_file_location("golden_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json") if "kind" in json.loads(path.read_text()))


def precision_of(dtype: torch.dtype) -> Precision:
    return "fp32" if dtype == torch.float32 else "bf16"


def build(net: DiT | VAE, state: dict[str, Tensor], device: str, dtype: torch.dtype) -> Any:
    net.load_state_dict(state)
    return net.to(device, dtype).eval().requires_grad_(False)


def run_dit(case: Case, device: str, dtype: torch.dtype) -> Outputs:
    dit: DiT = build(DiT(DiTConfig(**case.spec["config"])), case.weights(), device, dtype)
    latent, y, text = (case.input(n)[None].to(device) for n in ("in.latent", "in.y", "in.text"))
    context = dit.context(text, case.input("in.clip").to(device))
    audio = dit.audio_context(case.input("in.audio").to(device))
    times = case.spec["times"]
    named = {f"out.t{t:g}": t for t in times}
    return {
        name: dit(latent, torch.tensor([t], device=device), y, context, audio)[0] for name, t in named.items()
    }


def run_vae(case: Case, device: str, dtype: torch.dtype) -> Outputs:
    # As an engine of this precision runs it.
    kept = vae_dtype(precision_of(dtype), torch.device(device))
    vae: VAE = build(VAE(VAEConfig(dim=case.spec["dim"])), case.weights(), device, kept).channels_last()
    return {
        "out.encode": vae.encode(case.input("in.video").tanh().to(device)),
        "out.decode_unclamped": vae.decode(case.input("in.latent").to(device)),
    }


def run_color(case: Case, device: str, dtype: torch.dtype) -> Outputs:
    video = case.input("in.video").tanh().to(device, dtype)
    reference = (0.5 * case.input("in.ref") + 0.2).tanh().to(device)
    statistics = ops.lab_statistics(reference)
    return {"out": ops.color_match(video, *statistics, strength=case.spec["strength"])}


def run_clip(case: Case, device: str, dtype: torch.dtype) -> Outputs:
    encoder = clip_from_published(case.weights(), case.spec["config"]).to(device, dtype)
    return {"out": encoder(case.input("in.image").tanh().to(device))}


def run_umt5(case: Case, device: str, dtype: torch.dtype) -> Outputs:
    # Published weights are bfloat16 to begin with, and whatever they are stored in, the encoder computes in
    # float32: rounding a case's float32 weights is no part of what runs.
    encoder = umt5_from_published(case.weights(), case.spec["config"]).to(device)
    ids, mask = (torch.tensor(case.spec[name], device=device) for name in ("ids", "mask"))
    rows = zip(ids.split(1), mask.split(1), strict=True)
    return {"out": torch.cat([encoder.encode(*row) for row in rows])}


def run_wav2vec2(case: Case, device: str, dtype: torch.dtype) -> Outputs:
    encoder = wav2vec2_from_published(case.weights(), Wav2Vec2Config(**case.spec["config"]))
    samples = 0.1 * case.input("in.audio")
    return {"out": encoder.to(device, dtype)(samples.to(device), case.spec["seq_len"])}


def run_chunk_loop(case: Case, device: str, dtype: torch.dtype) -> Outputs:
    spec = case.spec
    stream = StreamConfig(
        height=spec["height"],
        width=spec["width"],
        frames=spec["frames"],
        motion_frames=spec["motion_frames"],
        steps=spec["steps"],
        color_strength=spec["color_strength"],
    )
    config = DiTConfig(**spec["dit"])
    model = Model(
        # In float32, as `load` leaves the VAE: the engine converts.
        dit=build(DiT(config), case.weights("dit_params"), device, torch.float32),
        vae=build(
            VAE(VAEConfig(dim=spec["vae_dim"])),
            case.weights("vae_params", "vae_seed"),
            device,
            torch.float32,
        ),
        audio_encoder=MelAudioEncoder(stream.sample_rate_hz, stream.fps),
        image_encoder=PatchImageEncoder(),
        text_encoder=NullTextEncoder(config.text_dim),
        stream=stream,
    )
    engine = Engine(model, precision=precision_of(dtype))
    assert engine.times == pytest.approx([t / 1000 for t in spec["timesteps_after_shift"]])
    constants = engine.constants(
        (0.7 * case.input("in.image")).tanh().to(device),
        case.input("in.text")[None].to(device),
        case.input("in.clip").to(device),
    )
    motion = constants.first_motion.float()
    outputs: Outputs = {}
    for chunk in range(spec["chunks"]):
        draws = iter(range(spec["steps"] + 1))

        def noise(chunk: int = chunk, draws: Any = draws) -> Tensor:
            name = f"noise.{chunk}.{next(draws)}"
            return case.input(name, "noise.{chunk}.{i}")[None].to(device)

        windows = case.input(f"in.audio.{chunk}", "in.audio.{chunk}").to(device)
        made = engine.run_chunk(constants, motion, windows, noise, lambda: False, StageClock(engine.device))
        assert made is not None and next(draws, None) is None, "every draw is used, in order"
        motion = made.motion
        outputs[f"out.latent.{chunk}"] = made.latent[0]
        outputs[f"out.frames.{chunk}"] = ((made.frames[0] + 1) * 127.5).permute(1, 2, 3, 0)
    return outputs


RUNNERS = {
    "dit": run_dit,
    "vae": run_vae,
    "color": run_color,
    "clip": run_clip,
    "umt5": run_umt5,
    "wav2vec2": run_wav2vec2,
    "chunk_loop": run_chunk_loop,
}


def relative_error(out: Tensor, expected: Tensor) -> float:
    assert out.shape == expected.shape
    out, expected = out.detach().double().cpu(), expected.double()
    return ((out - expected).norm() / expected.norm()).item()


def check(name: str, device: str, dtype: torch.dtype, bound: float) -> None:
    case = Case(FOLDER / f"{name}.json", load_recipe())
    with torch.no_grad():
        outputs = RUNNERS[case.spec["kind"]](case, device, dtype)
    assert outputs.keys() == case.expected.keys()
    errors = {key: relative_error(outputs[key], expected) for key, expected in case.expected.items()}
    # `not <` so that NaN fails.
    worse = {key: error for key, error in errors.items() if not error < bound}
    assert not worse, f"{name}: relative errors over {bound}: {worse}"


def bound_of(name: str) -> float:
    kind = json.loads((FOLDER / f"{name}.json").read_text())["kind"]
    return LOOP_BOUND if kind == "chunk_loop" else BOUND


def test_the_folder_has_cases() -> None:
    assert cases(), f"no golden cases in {FOLDER}"


@pytest.mark.parametrize("name", cases())
def test_float32_on_cpu(name: str) -> None:
    check(name, "cpu", torch.float32, bound_of(name))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", cases())
def test_bf16(name: str, device: str) -> None:
    check(name, device, torch.bfloat16, BF16_BOUND)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases())
def test_float32_on_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check(name, "cuda", torch.float32, bound_of(name))

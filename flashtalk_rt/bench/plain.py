"""The plain path: every op in plain torch, as the reference for speed and for results."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..config import Precision, StreamConfig
from ..errors import FlashTalkError
from ..modules.dit import DiT
from ..modules.model import Model
from ..modules.vae import VAE, Cache
from ..profiles.timing import Timing, measure
from ..runtime import Engine
from ..runtime.engine import DTYPES
from .models import DiTInputs, random_dit, random_vae

EXACT: tuple[Precision, ...] = ("fp32", "bf16")  # may err twice as much as plain torch does
LOSSY_ERROR = 0.1  # what any other precision may err
CHECKED_LAYERS = 2  # of the DiT


@torch.no_grad()
def plain_timings(
    model: Model, stream: StreamConfig, dtype: torch.dtype, compiler: str, repeats: int
) -> dict[str, Timing]:
    """The stages in plain torch under torch.compile, weights in `dtype`.  A step is extrapolated from DiTs of
    one and two layers, all layers being alike."""
    device = model.device
    torch.compiler.reset()  # what an earlier run compiled counts towards the limit that ends compilation

    def compiled(function: Any) -> Any:
        return torch.compile(function, backend=compiler, dynamic=False)

    def timed(function: Callable[[], object]) -> Timing:
        return measure(function, device, repeats=repeats)

    config = model.dit.config
    inputs = DiTInputs.draw(config, stream, device)
    vae = random_vae(model.vae.config, device, dtype)
    decode_step, encode, match = compiled(vae.decode_step), compiled(vae.encode), compiled(ops.color_match)
    frames = torch.rand(1, 3, stream.frames, stream.height, stream.width, device=device) * 2 - 1
    statistics = ops.lab_statistics(frames[:, :, :1])

    def decode() -> None:
        cache: Cache | None = None
        for i in range(stream.latent_frames):
            _, cache = decode_step(inputs.latent[:, :, i : i + 1], cache)

    with ops.plain_backends():
        steps = []
        for layers in sorted({min(config.num_layers, 1), min(config.num_layers, 2)}):
            dit = random_dit(dataclasses.replace(config, num_layers=layers), device, dtype)
            dit.forward = compiled(dit.forward)  # type: ignore[method-assign]
            steps.append(timed(inputs.step(dit)))
            del dit.forward  # a bound method in its own object's attributes, which would outlive this call
        one, two = steps[0].median_ms, steps[-1].median_ms
        rest_ms = max(0.0, two - one) * max(0, config.num_layers - 2)
        return {
            "dit_step_ms": Timing(tuple(sample + rest_ms for sample in steps[-1].samples_ms)),
            "vae_decode_ms": timed(decode),
            "vae_encode_ms": timed(lambda: encode(frames[:, :, -stream.motion_frames :])),
            "color_ms": timed(lambda: match(frames, *statistics, strength=1.0)),
        }


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.float() - exact).norm() / exact.norm())


@torch.no_grad()
def check_results(model: Model, stream: StreamConfig, precision: Precision) -> dict[str, float]:
    """Relative errors, against float32 in plain torch, of one step of a DiT of two layers, of the first two
    decoded latent frames and of encoding the motion frames, as an engine of `precision` computes them.

    Raises FlashTalkError where an exact precision errs more than twice as much as plain torch in the same
    dtype, and another one by more than LOSSY_ERROR: what is wrong needs no timing.
    """
    device, dtype = model.device, DTYPES[precision]
    config = model.dit.config
    config = dataclasses.replace(config, num_layers=min(config.num_layers, CHECKED_LAYERS))
    inputs = DiTInputs.draw(config, stream, device)
    ours = dataclasses.replace(
        model, dit=random_dit(config, device, dtype), vae=random_vae(model.vae.config, device, dtype)
    )
    plain = copy.deepcopy(ours.dit), copy.deepcopy(ours.vae)
    exact = copy.deepcopy(ours.dit).float(), copy.deepcopy(ours.vae).float()
    Engine(ours, 1, precision, stream.height, stream.width, capture=False)  # converts the networks

    def decoded(vae: VAE) -> Tensor:
        first, cache = vae.decode_step(inputs.latent[:, :, :1], None)
        return torch.cat((first, vae.decode_step(inputs.latent[:, :, 1:2], cache)[0]), dim=2).float()

    motion = torch.rand(1, 3, stream.motion_frames, stream.height, stream.width, device=device) * 2 - 1

    def results(dit: DiT, vae: VAE) -> dict[str, Tensor]:
        return {
            "dit_step": inputs.step(dit)().float(),
            "vae_decode": decoded(vae),
            "vae_encode": vae.encode(motion).float(),
        }

    with ops.plain_backends():
        low, right = results(*plain), results(*exact)
    got = results(ours.dit, ours.vae)
    errors = {}
    for name, expected in right.items():
        errors[name] = relative_error(got[name], expected)
        allowed = 2 * relative_error(low[name], expected) + 1e-5 if precision in EXACT else LOSSY_ERROR
        if not errors[name] <= allowed:  # so that NaN fails
            raise FlashTalkError(
                f"{name} in {precision} is off by {errors[name]:.2g} of its size, {allowed:.2g} is allowed; "
                "nothing was timed"
            )
    return errors

"""A training loop that can be stopped and resumed: schedule, EMA, checkpoint, log.

On CUDA a step's forward and backward pass is captured as a CUDA graph, once a shape of its inputs:
the tiny models launch thousands of kernels a step, and the host would be the slower half.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long and how fast.  The learning rate warms up linearly and falls along a cosine to 1 %."""

    steps: int
    peak_lr: float
    warmup: int = 200
    weight_decay: float = 0.01
    ema: float = 0.999
    max_grad_norm: float = 1.0
    save_every_s: float = 60.0
    log_every: int = 100

    def lr(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup)
        return self.peak_lr * warm * (0.505 + 0.495 * math.cos(math.pi * min(1.0, step / self.steps)))


Inputs = tuple[Tensor, ...]


class Gradients:
    """Computes a loss and leaves its gradient in the parameters."""

    def __init__(self, net: nn.Module, loss_of: Callable[..., Tensor]) -> None:
        self._net, self._loss_of = net, loss_of
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Inputs, Tensor]] = {}
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def __call__(self, inputs: Inputs) -> Tensor:
        """The loss of one batch, a scalar without gradient."""
        if not inputs[0].is_cuda:
            return self._run(inputs)
        key = tuple(x.shape for x in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        graph, held, loss = self._graphs[key]
        torch._foreach_copy_(list(held), list(inputs))
        graph.replay()
        return loss.clone()

    def _run(self, inputs: Inputs) -> Tensor:
        for parameter in self._net.parameters():
            assert parameter.grad is not None
            parameter.grad.zero_()
        loss = self._loss_of(*inputs)
        loss.backward()
        return loss.detach()

    def _capture(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs, Tensor]:
        held = tuple(x.clone() for x in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile, pick algorithms, allocate
                self._run(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._run(held)
        return graph, held, loss


def fit(
    net: nn.Module,
    inputs_of: Callable[[int], Inputs],
    loss_of: Callable[..., Tensor],
    config: FitConfig,
    checkpoint: Path,
    generator: torch.Generator,
    log: Log,
) -> list[dict[str, float]]:
    """Train `net` in place and leave its exponential moving average in it.

    `inputs_of(step)` draws one batch from `generator`; `loss_of(*inputs)` is its loss, and everything
    random is among the inputs.  `checkpoint` is read when it exists (CheckpointError if it is another
    network's) and written every `save_every_s` and at the end; it holds the generator's state, so a
    resumed run goes on to new data.  Returns the log: step, loss (mean since the last entry), learning
    rate and seconds, over all resumed parts.
    """
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=config.peak_lr, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True
    )
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    start, spent_s = 0, 0.0
    history: list[dict[str, float]] = []
    if checkpoint.is_file():
        start, history, spent_s = _resume(checkpoint, net, optimizer, average, generator)
        log(f"resuming {checkpoint} at step {start} of {config.steps}")
    begin = saved = time.perf_counter()
    losses: list[Tensor] = []
    gradients = Gradients(net, loss_of)
    net.train()
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr(step)
        with torch.no_grad():
            inputs = inputs_of(step)
        loss = gradients(inputs)
        nn.utils.clip_grad_norm_(net.parameters(), config.max_grad_norm)
        optimizer.step()
        # A young average would otherwise remember the random start.
        decay = min(config.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(net.parameters()), 1 - decay)
        losses.append(loss)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            seconds = spent_s + time.perf_counter() - begin
            history.append({"step": step + 1, "loss": mean, "lr": config.lr(step), "seconds": seconds})
            log(f"step {step + 1}/{config.steps}  loss {mean:.4f}  {seconds:.0f} s")
            if not math.isfinite(mean):
                raise CheckpointError(
                    f"the loss is {mean} at step {step + 1}; run again with a lower learning rate: it goes "
                    f"on from the last save in {checkpoint}, if there is one"
                )
            if time.perf_counter() - saved > config.save_every_s:
                _save(checkpoint, step + 1, net, optimizer, average, generator, history, seconds)
                saved = time.perf_counter()
    if start < config.steps:
        seconds = spent_s + time.perf_counter() - begin
        _save(checkpoint, config.steps, net, optimizer, average, generator, history, seconds)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(average[name])
    net.eval()
    return history


def _save(
    path: Path,
    step: int,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    generator: torch.Generator,
    history: list[dict[str, float]],
    seconds: float,
) -> None:
    state: dict[str, Any] = {
        "step": step,
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "average": average,
        "generator": generator.get_state(),
        "history": history,
        "seconds": seconds,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def _resume(
    path: Path,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
    generator: torch.Generator,
) -> tuple[int, list[dict[str, float]], float]:
    device = next(net.parameters()).device
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        average.update(state["average"])
        generator.set_state(state["generator"].cpu())
        resumed = state["step"], state["history"], state["seconds"]
    except (RuntimeError, KeyError, TypeError, ValueError, EOFError, UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is not a checkpoint of this training ({type(error).__name__}); move it away"
        ) from error
    return resumed

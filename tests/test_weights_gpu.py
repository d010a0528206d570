"""The published DiT's 38 GB load into GPU memory on a machine that has 24 GB of RAM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flashtalk_rt.config import DiTConfig
from flashtalk_rt.modules.dit import DiT

RAM_BYTES = 24 << 30
SHARD_BYTES = 4 << 30
CGROUP = Path("/sys/fs/cgroup/flashtalk-test")

LOAD = """
import json, os, sys, time
from pathlib import Path
folder, cgroup = Path(sys.argv[1]), Path(sys.argv[2])
(cgroup / "cgroup.procs").write_text(str(os.getpid()))  # from here on the kernel holds the limit
import torch
from flashtalk_rt.config import DiTConfig
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.weights import Part, SafetensorsFiles, fill
with torch.device("meta"):
    dit = DiT(DiTConfig())
begin = time.perf_counter()
fill(dit, Part(SafetensorsFiles(sorted(folder.glob("*.safetensors")))), torch.device("cuda"), torch.bfloat16)
torch.cuda.synchronize()
weight = dit.blocks[39].ffn[0].weight
print(json.dumps({
    "seconds": time.perf_counter() - begin,
    "gpu_bytes": torch.cuda.memory_allocated(),
    "ram_peak_bytes": int((cgroup / "memory.peak").read_text()),
    "first": weight.flatten()[:4].float().tolist(),
}))
"""


def write_random_dit(folder: Path) -> int:
    """Write the published DiT's names and shapes with repeated random bf16 values; returns the bytes."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in DiT(DiTConfig()).named_parameters()}
    noise = torch.randn(1 << 20).bfloat16()
    shard: dict[str, torch.Tensor] = {}
    held_bytes = total_bytes = index = 0
    for name, shape in shapes.items():
        count = shape.numel()
        shard[name] = noise.repeat(-(-count // len(noise)))[:count].view(shape)
        held_bytes += 2 * count
        if held_bytes > SHARD_BYTES:
            save_file(shard, str(folder / f"diffusion_pytorch_model-{index:05}.safetensors"))
            total_bytes, held_bytes, index, shard = total_bytes + held_bytes, 0, index + 1, {}
    save_file(shard, str(folder / f"diffusion_pytorch_model-{index:05}.safetensors"))
    return total_bytes + held_bytes


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_38_gb_load_with_24_gb_of_ram(tmp_path: Path, figures: dict[str, Any]) -> None:
    CGROUP.mkdir(exist_ok=True)
    try:
        (CGROUP / "memory.max").write_text(str(RAM_BYTES))
        total_bytes = write_random_dit(tmp_path)
        assert total_bytes > 37e9
        os.sync()
        ran = subprocess.run(
            [sys.executable, "-c", LOAD, str(tmp_path), str(CGROUP)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        loaded = json.loads(ran.stdout)
        figures |= {f"load_{name}": loaded[name] for name in ("seconds", "gpu_bytes", "ram_peak_bytes")}
        assert total_bytes <= loaded["gpu_bytes"] < 1.02 * total_bytes
        assert loaded["ram_peak_bytes"] <= RAM_BYTES
    finally:
        CGROUP.rmdir()

"""Loading holds the model and one tensor, never a second copy: anonymous memory, sampled each millisecond."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tiny_published
import torch

from flashtalk_rt.config import DiTConfig
from flashtalk_rt.modules.dit import DiT

SAMPLED = """
import json, os, sys, threading, time
from pathlib import Path
import torch
from flashtalk_rt.modules.weights import Part, SafetensorsFiles, fill
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.config import DiTConfig
from flashtalk_rt.modules.convert import _shards, _Stored, _write_safetensors

torch.set_num_threads(1)
folder, config = Path(sys.argv[1]), DiTConfig(**json.loads(sys.argv[2]))

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def watched(work):
    before, peak, done = anonymous_bytes(), 0, threading.Event()
    def sample():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)
    thread = threading.Thread(target=sample)
    thread.start()
    work()
    after = anonymous_bytes()
    done.set()
    thread.join()
    return max(peak, after) - before

with torch.device("meta"):
    dit = DiT(config)
part = Part(SafetensorsFiles(sorted(folder.glob("*.safetensors"))))

def write():
    stored = _Stored(dit, part, torch.float32, fp8=False)
    entries = _shards("dit", stored)[0][0]
    _write_safetensors(folder / "copy.bin", entries, stored.values())

filled = watched(lambda: fill(dit, part, torch.device("cpu"), torch.bfloat16))
os.fsync = lambda descriptor: None  # a second copy on the disk is nothing to wait for
written = watched(write)
print(json.dumps({"written": written, "filled": filled}))
"""


def test_memory_while_loading_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    """600 MB in four shards: no second copy, no whole shard, on the way in or when converting."""
    config: dict[str, int] = {
        "dim": 1536,
        "ffn_dim": 8192,
        "num_layers": 5,
        "num_heads": 12,
        "intermediate_dim": 64,
    }
    config |= {"text_dim": 64, "image_dim": 64, "audio_dim": 64, "output_dim": 64}
    with torch.device("meta"):
        shapes = tiny_published.shapes_of(DiT(DiTConfig(**config)))
    random = torch.randn(1 << 20).bfloat16()
    total_bytes, largest_bytes = 0, 0
    state: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        total_bytes, largest_bytes = total_bytes + 2 * count, max(largest_bytes, 2 * count)
        state[name] = random.repeat(-(-count // len(random)))[:count].view(shape)
    assert 550e6 < total_bytes < 650e6 and largest_bytes < 40e6
    tiny_published.write_shards(tmp_path, state, 4, index=False)
    del state
    ran = subprocess.run(
        [sys.executable, "-c", SAMPLED, str(tmp_path), json.dumps(config)],
        cwd=Path(__file__).parents[1],
        # Freed tensors go back to the system at once: else malloc keeps what it likes of them, up to 64 MB.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    peak = json.loads(ran.stdout)
    assert 0.95 * total_bytes < peak["filled"] < total_bytes + 2 * largest_bytes
    # In float32 a tensor is twice as large as stored; nothing else is held.
    assert 2 * largest_bytes <= peak["written"] < 2.5 * largest_bytes

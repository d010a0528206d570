"""A tiny folder in the published layout, random weights, for tests of loading."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from flashtalk_rt.config import DiTConfig, VAEConfig
from flashtalk_rt.modules import published
from flashtalk_rt.modules.dit import DiT
from flashtalk_rt.modules.encoders import WAV2VEC2_SETTINGS
from flashtalk_rt.modules.vae import VAE

DIT = DiTConfig(
    dim=48,
    ffn_dim=64,
    num_heads=2,
    num_layers=2,
    freq_dim=16,
    text_dim=32,
    text_len=8,
    image_dim=80,
    audio_blocks=2,
    audio_dim=32,
    intermediate_dim=8,
    output_dim=16,
    context_tokens=4,
)
VAE_CONFIG = VAEConfig(dim=4)  # the loader takes dim and z_dim from the file, the rest as published
WORDS = ("<pad>", "</s>", "<unk>", "a", "person", "is", "talking", ".")
AUDIO = transformers.Wav2Vec2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=40,
    conv_dim=[8] * 7,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
)

Shapes = dict[str, tuple[int, ...]]


def random_state(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small random weights; modulations and norms too, so that nothing is at its initial value."""
    state = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        state[name] = (torch.randn(shape) * scale + (len(shape) == 1 and name.endswith("weight"))).to(dtype)
    return state


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


def clip_shapes(dim: int = 80, layers: int = 3, patch: int = 14, patches: int = 4) -> Shapes:
    shapes: Shapes = {
        "log_scale": (),
        "textual.token_embedding.weight": (11, 4),
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, patches + 1, dim),
        "visual.head": (dim, 8),
        "visual.patch_embedding.weight": (dim, 3, patch, patch),
    }
    for norm in ("pre_norm", "post_norm"):
        shapes |= {f"visual.{norm}.weight": (dim,), f"visual.{norm}.bias": (dim,)}
    for i in range(layers):
        for leaf, rows, columns in (
            ("attn.to_qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.0", 4 * dim, dim),
            ("mlp.2", dim, 4 * dim),
        ):
            shapes |= {
                f"visual.transformer.{i}.{leaf}.weight": (rows, columns),
                f"visual.transformer.{i}.{leaf}.bias": (rows,),
            }
        for norm in ("norm1", "norm2"):
            shapes |= {
                f"visual.transformer.{i}.{norm}.weight": (dim,),
                f"visual.transformer.{i}.{norm}.bias": (dim,),
            }
    return shapes


def umt5_shapes(vocab: int = len(WORDS), dim: int = 32, layers: int = 2, shared: bool = False) -> Shapes:
    shapes: Shapes = {"token_embedding.weight": (vocab, dim), "norm.weight": (dim,)}
    if shared:
        shapes["pos_embedding.embedding.weight"] = (8, 2)
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm{n}.weight": (dim,) for n in (1, 2)}
        shapes |= {f"blocks.{i}.attn.{n}.weight": (24, dim) for n in "qkv"}
        shapes |= {f"blocks.{i}.attn.o.weight": (dim, 24)}
        shapes |= {f"blocks.{i}.ffn.{n}.weight": (40, dim) for n in ("gate.0", "fc1")}
        shapes |= {f"blocks.{i}.ffn.fc2.weight": (dim, 40)}
        if not shared:
            shapes[f"blocks.{i}.pos_embedding.embedding.weight"] = (8, 2)
    return shapes


def wav2vec2_state(config: transformers.Wav2Vec2Config = AUDIO) -> dict[str, Tensor]:
    """As the published pre-training checkpoint spells it: prefixed, old weight norm, quantizer and all."""
    network = transformers.Wav2Vec2Model(config)
    state = {}
    for name, value in random_state(shapes_of(network)).items():
        name = name.replace("parametrizations.weight.original0", "weight_g")
        name = name.replace("parametrizations.weight.original1", "weight_v")
        state[f"wav2vec2.{name}"] = value.abs() if name.endswith("weight_g") else value
    extra: Shapes = {"quantizer.codevectors": (1, 4, 2), "project_hid.weight": (2, 2), "project_q.bias": (2,)}
    return {**state, **random_state(extra)}


def write_tokenizer(folder: Path, words: Iterable[str] = WORDS) -> None:
    """A word-level tokenizer that ends every prompt with </s>."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write_published(folder: Path, seed: int = 0, shards: int = 3, index: bool = True) -> Path:
    """The whole folder, the audio encoder inside; returns it."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    defaults = DiTConfig()
    config = {k: getattr(DIT, k) for k in vars(DIT) if getattr(DIT, k) != getattr(defaults, k)}
    names = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "i2v"}
    (folder / "config.json").write_text(json.dumps({**names, **config, "eps": 1e-6, "in_dim": 36}))
    with torch.device("meta"):
        dit, vae = shapes_of(DiT(DIT)), shapes_of(VAE(VAE_CONFIG))
    write_shards(folder, random_state(dit, torch.bfloat16), shards, index)
    torch.save(random_state(vae), folder / published.VAE_FILE)
    torch.save(random_state(clip_shapes(), torch.float16), folder / published.CLIP_FILE)
    torch.save(random_state(umt5_shapes(), torch.bfloat16), folder / published.TEXT_FILE)
    write_tokenizer(folder / published.TOKENIZER)
    audio = folder / published.AUDIO_FOLDER
    audio.mkdir()
    settings = {key: getattr(AUDIO, key) for key in WAV2VEC2_SETTINGS}
    (audio / "config.json").write_text(json.dumps({"architectures": ["Wav2Vec2ForPreTraining"], **settings}))
    torch.save(wav2vec2_state(), audio / "pytorch_model.bin")
    return folder


def write_shards(folder: Path, state: dict[str, Tensor], count: int, index: bool) -> None:
    names = sorted(state)
    weight_map: dict[str, str] = {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: state[name] for name in names[i::count]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        path = folder / "diffusion_pytorch_model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

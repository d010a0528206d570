"""torch.compile sees through the ops: no graph break in a DiT block or in the VAE's decoder."""

from __future__ import annotations

import tiny
import torch

from flashtalk_rt import ops
from flashtalk_rt.modules.dit import Norm
from flashtalk_rt.modules.vae import CacheCursor


def test_a_block_compiles_whole() -> None:
    block = tiny.model().dit.blocks[0]
    x, normed, modulation = torch.randn(1, 8, 48), torch.randn(1, 8, 48), torch.randn(1, 6, 48)
    bias = ops.padding_bias(2, 4, x.device)
    context = block.cross_attn.context(torch.randn(1, 4, 48), torch.randn(1, 5, 48), bias)
    audio = block.audio_cross_attn.context(torch.randn(1, 2, 4, 16))
    table = ops.rope_table((2, 2, 2), 24, x.device)
    given = (x, normed, modulation, Norm.modulated(modulation, fp8=False), table, context, audio, 4)
    eager = block(*given)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), eager)


def test_the_decoder_compiles_whole() -> None:
    decoder = tiny.model().vae.decoder
    z = torch.randn(1, 16, 1, 4, 4)
    cursor = CacheCursor(None)
    eager = decoder(z, cursor)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    fresh = CacheCursor(None)
    torch.testing.assert_close(compiled(z, fresh), eager)
    for mine, theirs in zip(fresh.future, cursor.future, strict=True):
        torch.testing.assert_close(mine, theirs)

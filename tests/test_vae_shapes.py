"""Shapes that do not fit the VAE's ops, past which a kernel would read: named whatever the backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flashtalk_rt import ops
from flashtalk_rt.errors import InputError

X, C = torch.zeros(1, 12, 2, 3, 5), torch.zeros(12)
MISFITS = [
    (lambda: ops.norm_silu(X, C[:4], None), "norm_silu: gamma is .4.; it must be .12."),
    (lambda: ops.norm_silu(X[0], C, None), "norm_silu: x is"),
    (lambda: ops.norm_silu(X, C, X[:, :, :1]), "norm_silu: past is"),
    (lambda: ops.norm_silu(X, C, None, C[:1]), "norm_silu: bias is"),
    (lambda: ops.add_norm_silu(X, None, X[:, :, :1], C, None), "add_norm_silu: shortcut is"),
    (lambda: ops.add_residual(X, C[:3], X), "add_residual: bias is"),
    (lambda: ops.add_residual(X, None, X[..., :1]), "add_residual: shortcut is"),
    (lambda: ops.double_frames(X[:, :11], None), "double_frames: 11 channels"),
    (lambda: ops.double_frames(X, C[:6]), "double_frames: bias is"),
    (lambda: ops.upsample_conv(X, torch.zeros(4, 6, 11, 2, 2), C[:6]), "upsample_conv: folded is"),
    (lambda: ops.vae_head(X, None, None, C, None, torch.zeros(3, 11, 3, 3, 3), C[:3], True), "weight is"),
    (lambda: ops.vae_head(X, None, None, C, None, torch.zeros(3, 12, 3, 3, 3), C, True), "out_bias is"),
    (lambda: ops.lab_statistics(X), "12 channels"),
    (lambda: ops.color_match(X[:, :3], torch.zeros(1, 1, 3), torch.ones(1, 1, 3, 1, 1), 1.0), "deviation is"),
]


@pytest.mark.parametrize(("call", "named"), MISFITS, ids=[named for _, named in MISFITS])
def test_a_shape_that_does_not_fit_is_named(call: Callable[[], object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        call()

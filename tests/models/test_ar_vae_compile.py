"""The training pass of the AR-VAE is one graph: nothing in it needs Python or the values of a tensor."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from ardist.models.ar_vae import ARVAE, preset

torch.manual_seed(0)
model = ARVAE(preset("tiny", width=32, depth=1, num_heads=2, tokens_per_frame=6, image_size=32, temporal=True))
frames = torch.rand(1, 3, 3, 32, 32)
for checkpointing in (False, True):
    torch.compiler.reset()
    model.zero_grad()
    model.set_activation_checkpointing(checkpointing)
    reconstruction, _, _ = torch.compile(model, backend="eager", fullgraph=True)(frames)
    torch.testing.assert_close(reconstruction, model(frames)[0])
    reconstruction.mean().backward()
    assert model.encoder.patch_embed.weight.grad is not None
"""


@pytest.mark.slow
def test_training_pass_is_one_graph() -> None:
    """In a process of its own, because the shape checks of the tests wrap every annotated class in Python."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]

"""Weights on disk: what was saved comes back, and everything that is not exactly that is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ardist.errors import CheckpointError
from ardist.models import weights
from ardist.models.ar_vae import ARVAE, preset


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ARVAE]:
    torch.manual_seed(0)
    model = ARVAE(preset("tiny", width=32, depth=1, num_heads=2)).eval()
    weights.save_ar_vae(tmp_path / "bundle", model)
    return tmp_path / "bundle", model


def edit(directory: Path, **changes: object) -> None:
    config = json.loads((directory / weights.CONFIG_FILE).read_text())
    (directory / weights.CONFIG_FILE).write_text(json.dumps({**config, **changes}))


def test_round_trip_is_exact(saved: tuple[Path, ARVAE]) -> None:
    directory, model = saved
    frames = torch.rand(1, 2, 3, 64, 64)
    again = weights.load_ar_vae(directory)
    assert again.config == model.config
    assert torch.equal(again.encode(frames), model.encode(frames))
    assert not [path for path in directory.iterdir() if "tmp" in path.name]


def test_a_flipped_bit_is_noticed(saved: tuple[Path, ARVAE]) -> None:
    path = saved[0] / weights.AR_VAE_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        weights.load_ar_vae(saved[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version 2, this code reads version 1"),
        ({"format": "other"}, "does not describe a bundle"),
        ({"ar_vae": None}, "holds no AR-VAE"),
        ({"ar_vae": {"preset": "tiny", "widht": 3}}, "another version"),
        ({"ar_vae": {"preset": "tiny", "width": 64, "depth": 1, "num_heads": 2}}, "does not fit the model"),
        ({"digests": {}}, "has no ar_vae.safetensors"),
        ({"digests": None}, "has no ar_vae.safetensors"),
        ({"version": None}, "version None"),
    ],
)
def test_refusals(saved: tuple[Path, ARVAE], changes: dict[str, object], words: str) -> None:
    edit(saved[0], **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        weights.load_ar_vae(saved[0])
    assert caught.value.exit_code == 3


def test_missing_and_unreadable(saved: tuple[Path, ARVAE], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no bundle at"):
        weights.load_ar_vae(tmp_path / "absent")
    (saved[0] / weights.AR_VAE_FILE).unlink()
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        weights.load_ar_vae(saved[0])
    (saved[0] / weights.CONFIG_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        weights.load_ar_vae(saved[0])


def test_values_that_are_not_finite_are_not_written(saved: tuple[Path, ARVAE]) -> None:
    directory, model = saved
    before = weights.weights_digest(directory / weights.AR_VAE_FILE)
    with torch.no_grad():
        model.encoder.moments.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match="encoder.moments.bias holds values that are not finite"):
        weights.save_ar_vae(directory, model)
    assert weights.weights_digest(directory / weights.AR_VAE_FILE) == before


def test_a_failed_write_leaves_the_old_file(saved: tuple[Path, ARVAE], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, model = saved
    before = weights.weights_digest(directory / weights.AR_VAE_FILE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    with torch.no_grad():
        model.encoder.moments.bias[0] = 5.0
    with pytest.raises(OSError, match="No space"):
        weights.save_ar_vae(directory, model)
    assert weights.weights_digest(directory / weights.AR_VAE_FILE) == before
    assert sorted(path.name for path in directory.iterdir()) == [weights.AR_VAE_FILE, weights.CONFIG_FILE]


def test_temporal_and_half_precision_models_come_back(tmp_path: Path) -> None:
    model = ARVAE(preset("tiny", width=32, depth=1, num_heads=2, temporal=True)).bfloat16()
    weights.save_ar_vae(tmp_path, model)
    again = weights.load_ar_vae(tmp_path)
    assert again.config.temporal
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name].float()), name


def test_a_damaged_file_with_a_right_digest_is_refused(saved: tuple[Path, ARVAE]) -> None:
    path = saved[0] / weights.AR_VAE_FILE
    path.write_bytes(path.read_bytes()[:1000])
    edit(saved[0], digests={weights.AR_VAE_FILE: weights.weights_digest(path)})
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        weights.load_ar_vae(saved[0])

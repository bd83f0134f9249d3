"""Latents through an AR-VAE bundle: the right values, each frame once, NaN and lack of memory handled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dt_builds import build_small, quarantine, samples
from dt_videos import make_video

from ardist.config import ARVAEConfig
from ardist.data.manifest import load_manifest
from ardist.errors import CheckpointError, ConfigError
from ardist.models.ar_vae import ARVAE
from ardist.models.weights import load_ar_vae, save_ar_vae
from data_tools import encode
from data_tools.cli import main
from data_tools.encode import EncoderChoice, LatentEncoder
from data_tools.reasons import Reason, Refusal
from data_tools.verify import verify


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny autoencoder with random weights for frames of 16 pixels."""
    torch.manual_seed(0)
    config = ARVAEConfig(
        image_size=16, patch_size=8, width=32, depth=1, num_heads=2, latent_channels=4, tokens_per_frame=6
    )
    folder = tmp_path_factory.mktemp("bundle")
    save_ar_vae(folder, ARVAE(config))
    return folder


@pytest.fixture(autouse=True)
def _no_cached_encoder() -> None:
    encode._load.cache_clear()


def _choice(bundle: Path, **changes: object) -> EncoderChoice:
    return replace(EncoderChoice(str(bundle), "cpu", batch_frames=5), **changes)  # type: ignore[arg-type]


def test_latents_are_those_of_the_pixels(three_videos: Path, bundle: Path, tmp_path: Path) -> None:
    """Overlapping clips, an odd batch size: every stored latent equals the encoding of the stored pixels."""
    build_small(three_videos, tmp_path / "pixels", stride=1)
    summary = build_small(three_videos, tmp_path / "latents", _choice(bundle), stride=1)
    manifest = summary.manifest
    assert (manifest.kind, manifest.dtype, manifest.shape) == ("latents", "float16", (4, 6, 4))
    pixels = {(i["source"], i["start_frame"]): a for a, i in samples(tmp_path / "pixels").values()}
    latents = {(i["source"], i["start_frame"]): a for a, i in samples(tmp_path / "latents").values()}
    assert set(pixels) == set(latents)
    assert len(latents) == 27
    model = load_ar_vae(bundle)
    for where, array in pixels.items():
        frames = torch.from_numpy(array).permute(0, 3, 1, 2)[None].float() / 255
        with torch.inference_mode():
            expected = model.encode(frames)[0].numpy()
        np.testing.assert_allclose(latents[where].astype(np.float32), expected, atol=2e-3)
    stacked = np.stack(list(latents.values())).astype(np.float64).reshape(-1, 4)
    assert manifest.latent_statistics is not None
    np.testing.assert_allclose(manifest.latent_statistics.mean, stacked.mean(0), atol=1e-9)
    np.testing.assert_allclose(manifest.latent_statistics.std, stacked.std(0), atol=1e-9)
    assert manifest.vae is not None
    assert manifest.vae.config_digest == model.config.digest()
    assert not verify(str(tmp_path / "latents")).problems


def test_the_same_build_gives_the_same_latents(three_videos: Path, bundle: Path, tmp_path: Path) -> None:
    first = build_small(three_videos, tmp_path / "a", _choice(bundle)).manifest
    second = build_small(three_videos, tmp_path / "b", _choice(bundle)).manifest
    assert first.digest() == second.digest()
    other = build_small(three_videos, tmp_path / "c", _choice(bundle, precision="bf16")).manifest
    assert other.dataset_id != first.dataset_id


def test_one_worker_per_device_gives_the_same_latents(three_videos: Path, bundle: Path, tmp_path: Path) -> None:
    alone = build_small(three_videos, tmp_path / "a", _choice(bundle)).manifest
    shared = _choice(bundle, device="cpu,cpu")
    assert len(shared.devices()) == 2
    both = build_small(three_videos, tmp_path / "b", shared, workers=2, start_method="fork").manifest
    assert both.digest() == alone.digest()


def test_every_frame_is_encoded_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = LatentEncoder(str(bundle), device="cpu", precision="fp32", batch_frames=4)
    seen: list[int] = []
    forward = encoder._forward

    def count(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return forward(batch)

    monkeypatch.setattr(encoder, "_forward", count)
    frames = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    arrays = list(encoder.encode(frames, [0, 1, 2, 12], 4))
    assert sum(seen) == 6 + 4
    assert max(seen) == 4
    assert [array.shape for array in arrays if isinstance(array, np.ndarray)] == [(4, 6, 4)] * 4
    np.testing.assert_array_equal(arrays[0][1:], arrays[1][:3])


def test_a_nan_costs_the_clips_that_hold_it(
    three_videos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARDIST_FAULT", "value@build.encoded#1:nan")
    summary = build_small(three_videos, tmp_path / "out", _choice(bundle), stride=2)
    records = quarantine(tmp_path / "out")
    assert [(record["stage"], record["reason"]) for record in records] == [("encode", "nonfinite")]
    assert summary.manifest.num_samples == 14
    assert all(np.isfinite(array).all() for array, _ in samples(tmp_path / "out").values())


def test_out_of_memory_halves_the_batch_then_refuses(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = LatentEncoder(str(bundle), device="cpu", precision="fp32", batch_frames=8)
    forward = encoder._forward

    def small_memory(batch: torch.Tensor) -> torch.Tensor:
        if len(batch) > 3 or (batch == 7).flatten(1).all(1).any():
            # As a CPU says it, and as a GPU does.
            kind = RuntimeError if len(batch) % 2 else torch.OutOfMemoryError
            raise kind("simulated: can't allocate memory")
        return forward(batch)

    frames = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    plain = list(encoder.encode(frames, [0, 4], 4))
    monkeypatch.setattr(encoder, "_forward", small_memory)
    for have, want in zip(encoder.encode(frames, [0, 4], 4), plain, strict=True):
        np.testing.assert_allclose(have, want, atol=1e-3)
    frames[5] = 7
    good, refused = encoder.encode(frames, [0, 4], 4)
    np.testing.assert_allclose(good, plain[0], atol=1e-3)
    assert isinstance(refused, Refusal)
    assert refused.reason is Reason.MEMORY


def test_a_wrong_bundle_is_refused_before_anything_is_written(
    three_videos: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="legal: 16"):
        build_small(three_videos, tmp_path / "out", _choice(bundle), size=32)
    with pytest.raises(CheckpointError):
        build_small(three_videos, tmp_path / "out", _choice(tmp_path))
    words = ["build", "--videos", str(three_videos), "--out", str(tmp_path / "out"), "--size", "16"]
    assert main([*words, "--encoder", str(tmp_path / "none")]) == 2
    assert main([*words, "--encoder", str(bundle), "--device", "cuda"]) == (0 if torch.cuda.is_available() else 4)
    capsys.readouterr()
    if not torch.cuda.is_available():
        assert not (tmp_path / "out").exists()


def test_a_clip_with_class_and_caption(bundle: Path, tmp_path: Path) -> None:
    make_video(tmp_path / "v" / "a.mp4")
    make_video(tmp_path / "v" / "b.mp4", pattern="testsrc")
    (tmp_path / "labels.csv").write_text('path,label,caption\na.mp4,run,"a man, running"\nb.mp4,jump,\n')
    words = ["build", "--videos", str(tmp_path / "v"), "--out", str(tmp_path / "out"), "--size", "16"]
    words += ["--num-frames", "4", "--stride", "4", "--encoder", str(bundle), "--labels", str(tmp_path / "labels.csv")]
    assert main(words) == 0
    assert load_manifest(tmp_path / "out").classes == ("jump", "run")
    found = {(i["source"], i["class_id"], i["caption"]) for _, i in samples(tmp_path / "out").values()}
    assert found == {("a.mp4", 1, "a man, running"), ("b.mp4", 0, None)}

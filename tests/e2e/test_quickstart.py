"""The whole road on real clips, with few training steps: every stage runs as its own command and leaves its files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import av
import pytest

from ardist.data.manifest import load_manifest
from ardist.report.metrics import read_metrics, series

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS = 16


def ardist(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ardist.cli", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=800)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quickstart") / "with space"
    done = ardist("quickstart", "--dir", directory, "--steps", STEPS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return directory


def frames_of(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_datasets_hold_both_parts(root: Path) -> None:
    for name, kind, frames in (("pixels-train", "pixels", 1), ("pixels-held-out", "pixels", 16)):
        manifest = load_manifest(str(root / "data" / name))
        assert manifest.kind == kind
        assert manifest.shards[0].shape[0] == frames
        assert manifest.num_samples > 20
    latents = load_manifest(str(root / "data" / "latents-train"))
    assert latents.kind == "latents"
    assert latents.vae is not None
    assert latents.num_samples > 300


def test_the_denoiser_was_interrupted_and_went_on(root: Path) -> None:
    run = root / "train" / "denoiser"
    steps, _ = series(read_metrics(run), "loss")
    assert steps[-1] == STEPS
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert f"step-{STEPS:08d}" in kept
    assert not [name for name in kept if "tmp" in name]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == STEPS
    assert (run / "config.resolved.yaml").exists()
    assert list(run.rglob("*.wandb")), "W&B wrote no offline record"


def test_samples_have_the_frames_asked_for(root: Path) -> None:
    expected = {"synchronous": 16, "in-between": 16, "frame-by-frame": 16, "longer-than-training": 40}
    assert {path.stem: frames_of(path) for path in (root / "samples").glob("*.mp4")} == expected


def test_the_report_stands_alone(root: Path) -> None:
    text = (root / "report.html").read_text(encoding="utf-8")
    assert text.count("data:video/mp4") == 4
    assert text.count("data:image/png") >= 7
    scores = json.loads((root / "scores" / "ar-vae.json").read_text())
    assert 10 < scores["constant_colour_psnr"] < 16
    assert scores["pca_psnr"] > scores["constant_colour_psnr"] + 4


def test_a_second_run_reuses_everything(root: Path) -> None:
    before = (root / "report.html").stat().st_mtime_ns
    done = ardist("quickstart", "--dir", root, "--steps", STEPS)
    assert done.returncode == 0
    assert done.stderr.count("already finished, reused") == 9
    assert (root / "report.html").stat().st_mtime_ns == before


def test_another_bundle_version_is_refused(root: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in (root / "bundles" / "denoiser").iterdir():
        (bundle / path.name).write_bytes(path.read_bytes())
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").write_text(json.dumps({**config, "version": 99}))
    done = ardist("sample", "--bundle", bundle, "--out", tmp_path / "x.mp4")
    assert done.returncode == 3
    assert "99" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.mp4").exists()


def test_missing_things_are_named(root: Path, tmp_path: Path) -> None:
    done = ardist("export", tmp_path, "--out", tmp_path / "bundle")
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)
    assert "checkpoint" in done.stderr
    done = ardist("sample", "--bundle", tmp_path / "absent", "--out", tmp_path / "x.mp4")
    assert done.returncode == 3
    assert "absent" in done.stderr
    done = ardist("sample", "--bundle", root / "bundles" / "denoiser", "--out", tmp_path / "x.mp4", "--steps", 51)
    assert done.returncode == 2
    assert "51" in done.stderr
    done = ardist("evaluate", "--bundle", root / "bundles" / "denoiser", "--dataset", tmp_path)
    assert done.returncode == 3

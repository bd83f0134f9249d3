"""Images and clips in one run under a token budget: steps of unlike batches, the same on every number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import TOKENS, losses, records, sample_ids, tiny_config, train_outcome, weights, write_latents

from ardist.config import TrainConfig
from ardist.models.flops import denoiser_flops
from ardist.training.dry_run import _largest

pytestmark = pytest.mark.distributed

STEPS, FRAMES = 12, 16
CLIPS, IMAGES = 8, 128
BUDGET = CLIPS * FRAMES * TOKENS


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two steps of clips for one of images; both datasets begin again within the run."""
    base = tmp_path_factory.mktemp("buckets")
    videos = write_latents(base / "videos", samples=40, frames=FRAMES)
    images = write_latents(base / "images", samples=300, frames=1, seed=1)
    return [{"path": str(videos), "weight": 2}, {"path": str(images), "weight": 1}]


def config_of(run_dir: Path, mixture: list[dict[str, Any]], **changes: Any) -> TrainConfig:
    data = {"data__path": "", "data__mixture": mixture, "data__mixture_by": "step", "data__tokens_per_batch": BUDGET}
    return tiny_config(run_dir, run_dir, **{**data, "training__steps": STEPS, **changes})


def train_on(ranks: int, run_dir: Path, mixture: list[dict[str, Any]], **changes: Any) -> None:
    config = config_of(run_dir, mixture, **changes)
    stops = config.training.stop_after is not None
    for outcome in run_ranks(train_outcome, ranks, config):
        assert outcome.startswith("Preempted: stopped as") if stops else outcome == "done", outcome


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, mixture: list[dict[str, Any]]) -> Path:
    """A run on two ranks from the first to the last step, two micro-batches per step."""
    run_dir = tmp_path_factory.mktemp("whole")
    train_on(2, run_dir, mixture)
    return run_dir


def test_every_step_is_of_one_kind_and_counts_as_what_it_is(whole: Path, mixture: list[dict[str, Any]]) -> None:
    sizes = {step: len(ids) for step, ids in sample_ids(whole).items()}
    assert list(sizes) == list(range(1, STEPS + 1))
    assert sorted(sizes.values()) == [CLIPS] * 8 + [IMAGES] * 4
    model = config_of(whole, mixture).denoiser
    assert model is not None
    flops = {CLIPS: CLIPS * denoiser_flops(model, FRAMES).training, IMAGES: IMAGES * denoiser_flops(model, 1).training}
    total = 0
    for step, record in sorted(records(whole).items()):
        total += sizes[step]
        assert record["samples"] == total
        assert record["clips_per_second"] * record["step_seconds"] == pytest.approx(sizes[step])
        assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(BUDGET)
        assert record["tflops"] * 1e12 * record["step_seconds"] == pytest.approx(flops[sizes[step]])
        named = {name: len(value) for name, value in record.items() if name.startswith("loss_per_frame")}
        assert named == {CLIPS: {"loss_per_frame": FRAMES}, IMAGES: {"loss_per_frame_1": 1}}[sizes[step]]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["samples"] == 8 * CLIPS + 4 * IMAGES


def test_a_log_point_over_steps_of_both_kinds_counts_both(tmp_path: Path, mixture: list[dict[str, Any]]) -> None:
    train_on(1, tmp_path, mixture, training__log_every=6)
    record = records(tmp_path)[6]
    assert set(records(tmp_path)) == {1, 6, 12}
    clips = sum(len(ids) for step, ids in sample_ids(tmp_path).items() if 1 < step <= 6)
    seconds = 5 * record["step_seconds"]
    assert record["clips_per_second"] * seconds == pytest.approx(clips)
    assert record["tokens_per_second"] * seconds == pytest.approx(5 * BUDGET)


@pytest.mark.parametrize(("ranks", "changes"), [(1, {}), (2, {"micro_batch_size": 4}), (4, {"zero_stage": 3})])
def test_ranks_and_micro_batches_have_one_loss_curve(
    tmp_path: Path, mixture: list[dict[str, Any]], whole: Path, ranks: int, changes: dict[str, Any]
) -> None:
    """The loss of a step is the mean over its clips, however many parts they were cut into."""
    train_on(ranks, tmp_path, mixture, **{f"training__{name}": value for name, value in changes.items()})
    assert sample_ids(tmp_path) == sample_ids(whole)
    assert losses(tmp_path) == pytest.approx(losses(whole), abs=1e-5)
    expected = weights(whole, "ema_0.9")
    for name, value in weights(tmp_path, "ema_0.9").items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("stop", "ranks"), [(1, 2), (5, 2), (5, 1), (5, 4)])
def test_a_resumed_run_goes_on_with_the_same_steps(
    tmp_path: Path, mixture: list[dict[str, Any]], whole: Path, stop: int, ranks: int
) -> None:
    train_on(2, tmp_path, mixture, training__stop_after=stop)
    train_on(ranks, tmp_path, mixture)
    assert sample_ids(tmp_path) == sample_ids(whole)
    assert losses(tmp_path) == (losses(whole) if ranks == 2 else pytest.approx(losses(whole), abs=1e-5))
    counted = [[record["samples"] for _, record in sorted(records(run).items())] for run in (tmp_path, whole)]
    assert counted[0] == counted[1]
    if ranks == 2:
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema_0.9"):
            expected = weights(whole, kind)
            assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path, kind).items()), kind


def micro_batches_seen(config: TrainConfig) -> tuple[list[tuple[int, int]], set[tuple[int, int]]]:
    """(clips, frames) of the dry run, and of all micro-batches that were trained."""
    from ardist.training import dry_run
    from ardist.training.objectives import DenoiserObjective

    dry: list[tuple[int, int]] = []
    trained: set[tuple[int, int]] = set()
    run, loss = dry_run._forward_and_backward, DenoiserObjective.loss

    def watched(trainer: Any, batch: Any) -> None:
        dry.append(tuple(batch.values.shape[:2]))
        run(trainer, batch)

    def counted(self: Any, forward: Any, inputs: Any) -> Any:
        trained.add(tuple(inputs["noisy"].shape[:2]))
        return loss(self, forward, inputs)

    dry_run._forward_and_backward = watched
    DenoiserObjective.loss = counted  # type: ignore[method-assign]
    assert train_outcome(config) == "done"
    return dry, trained


@pytest.mark.parametrize(
    ("ranks", "more", "largest", "micro_batches"),
    [
        (1, 0, (2, 16), {(2, 16), (32, 1)}),  # as many tokens: the longer clips
        (1, 40, (35, 1), {(2, 16), (35, 1)}),  # 140 images have 420 tokens, 8 clips 384
        (2, 0, (2, 16), {(2, 16), (32, 1)}),
    ],
)
def test_micro_batches_are_cut_in_proportion_and_the_largest_is_tried_first(
    tmp_path: Path,
    mixture: list[dict[str, Any]],
    ranks: int,
    more: int,
    largest: tuple[int, int],
    micro_batches: set[tuple[int, int]],
) -> None:
    config = config_of(tmp_path, mixture, data__tokens_per_batch=BUDGET + more, training__steps=3)
    for dry, trained in run_ranks(micro_batches_seen, ranks, config):
        assert dry == [largest]
        assert trained == micro_batches


def test_context_counts_when_the_largest_micro_batch_is_looked_for() -> None:
    """Every image brings as many context tokens as a clip does."""

    def largest(context_tokens: int) -> tuple[int, int]:
        trainer: Any = SimpleNamespace(
            world=SimpleNamespace(size=2),
            engine=SimpleNamespace(accumulation=2),
            loader=SimpleNamespace(global_batch_sizes=(CLIPS, IMAGES)),
            data=SimpleNamespace(
                manifests=[
                    SimpleNamespace(shape=(frames, TOKENS, 4), context_shape=(context_tokens, 8))
                    for frames in (FRAMES, 1)
                ]
            ),
        )
        manifest, clips = _largest(trainer)
        return clips, manifest.shape[0]

    assert (largest(0), largest(1)) == ((2, FRAMES), (32, 1))

"""What cannot start is refused with one message that lists every problem, before any process group exists."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import settings, tiny_config, write_latents, write_pixels

from ardist.config import TrainConfig, check
from ardist.data.batch import RowBuffer
from ardist.data.manifest import load_manifest, write_manifest
from ardist.errors import ArdistError, ConfigError, DataError
from ardist.events import events
from ardist.training import commit as commits
from ardist.training.commit import Commit
from ardist.training.deepspeed_overrides import KNOWN_KEYS, override_problems
from ardist.training.main import main
from ardist.training.preflight import check_run
from ardist.training.trainer import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"), samples=16)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("pixels"), samples=8)


def problems(config: TrainConfig, ranks: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ArdistError) as caught:
        train(config)
    assert not torch.distributed.is_initialized()
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("changes", "ranks", "wanted"),
    [
        ({}, 3, ["global_batch_size=8 cannot be split over 3 ranks; legal numbers of ranks: [1, 2, 4, 8]"]),
        ({"denoiser__tokens_per_frame": 5}, 1, ["latents of 3 tokens x 4 channels", "tokens_per_frame=5"]),
        ({"denoiser__num_classes": 3}, 1, ["no class labels"]),
        ({"denoiser__positions": "sincos", "denoiser__max_frames": 2}, 1, ["clips of 4 frames", "max_frames is 2"]),
        ({"training__precision": "fp16"}, 1, ["fp16 needs a GPU; legal on a CPU: bf16, fp32"]),
        ({"deepspeed__train_batch_size": 3}, 1, ["derived from training.global_batch_size"]),
        ({"data__mixture": [{"path": "/nowhere", "weight": 1}], "data__path": ""}, 1, ["DataError", "/nowhere"]),
        ({"data__path": "/nowhere"}, 1, ["DataError", "/nowhere"]),
        ({"validation__path": "/nowhere"}, 1, ["DataError", "/nowhere"]),
        ({"init_from": "/nowhere"}, 1, ["init_from: '/nowhere' is not a directory"]),
        ({"training__global_batch_size": 64}, 1, ["data, ", "16"]),
        (
            {"denoiser__context_tokens": 2, "denoiser__context_dim": 8},
            1,
            ["holds no context embeddings", "context_dim=8"],
        ),
        ({"deepspeed__bf16__enabled": True}, 1, ["deepspeed.bf16: this is derived from training.precision"]),
        ({"deepspeed__fp16": {}}, 1, ["deepspeed.fp16: this is derived from training.precision"]),
        ({"deepspeed__data_types": {}}, 1, ["deepspeed.data_types: this is derived from training.grad_accumulation"]),
        ({"deepspeed__zero_optimization__stage": 2}, 1, ["zero_optimization.stage: ", "training.zero_stage"]),
        ({"deepspeed__zero_optimization__offload_param": {}}, 1, ["offload_param: ", "training.offload;"]),
        ({"deepspeed__zero_optimization": True}, 1, ["deepspeed.zero_optimization: a mapping", "not True"]),
        ({"deepspeed__timers": {"a": [{"b": float("nan")}]}}, 1, ["deepspeed.timers: nan is not a finite number"]),
        ({"deepspeed__torch_autocast": {"enabled": True, "dtyp": "bfloat16"}}, 1, ["torch_autocast.dtyp", "'dtype'?"]),
        ({"deepspeed__zero_optimization__overlap_com": True}, 1, ["zero_optimization.overlap_com: Extra inputs"]),
        ({"deepspeed__zero_optimization__compute_grad_norm": False}, 1, ["derived from training.guard"]),
        ({"deepspeed__comms_logger": {"enabled": "perhaps"}}, 1, ["comms_logger.enabled: Input should be a valid"]),
        ({"deepspeed__wall_clock_brekdown": True}, 1, ["no such setting (did you mean 'wall_clock_breakdown'?)"]),
    ],
)
def test_each_problem_is_named(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    ranks: int,
    wanted: list[str],
) -> None:
    message = problems(tiny_config(tmp_path / "run", data, **changes), ranks, monkeypatch)
    for text in wanted:
        assert text in message
    assert not (tmp_path / "run").exists(), "nothing is created for a run that cannot start"


def test_the_known_settings_are_those_that_deepspeed_reads() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    class Recorder(dict[str, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            read.add(key)
            return super().__contains__(key)

    read: set[Any] = set()
    # The constructor wants a process group; the part that reads the settings does not.
    DeepSpeedConfig._initialize_params(object.__new__(DeepSpeedConfig), Recorder(train_batch_size=1))
    assert len(read) > 20
    assert read <= KNOWN_KEYS


def test_settings_that_deepspeed_knows_pass() -> None:
    known = {
        "zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]},
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "wall_clock_breakdown": True,
        "comms_logger": {"enabled": True},
    }
    assert list(override_problems(known)) == []


@pytest.mark.parametrize("text", ["kil@trainer.loss", "kill@", "raise@trainer.metrics:EIO"])
def test_a_malformed_fault_is_refused_by_name(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("ARDIST_FAULT", text)
    message = problems(tiny_config(tmp_path / "run", data), 1, monkeypatch)
    assert message.startswith("ConfigError: ")
    assert f"ARDIST_FAULT: cannot read {text!r}" in message


def test_a_run_directory_is_a_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(data, data).model_copy(update={"run_dir": "s3://bucket/run"})
    assert "run_dir: 's3://bucket/run' is no folder" in problems(config, 1, monkeypatch)


def test_all_problems_come_in_one_message(tmp_path: Path, data: Path, pixels: Path, monkeypatch: Any) -> None:
    changes: dict[str, Any] = {
        "denoiser__latent_channels": 8,
        "validation__path": str(pixels),
        "deepspeed__optimizer": {},
        "init_from": "/nowhere",
    }
    message = problems(tiny_config(tmp_path, data, **changes), 3, monkeypatch)
    assert message.startswith("ConfigError: this run cannot start, 5 problems:")
    for text in ("3 ranks", "latent_channels=8", "holds pixels", "deepspeed.optimizer", "init_from"):
        assert text in message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"training__zero_stage": 3, "training__guard": "device"}, "ZeRO-3 always checks by itself"),
        ({"training__zero_stage": 0, "training__offload": "optimizer"}, "needs zero_stage 1, 2 or 3"),
        ({"training__offload": "parameters"}, "offload: parameters needs zero_stage 3"),
        ({"optimizer__schedule": "wsd"}, "decay_steps of 1 or more"),
        ({"optimizer__schedule": "constant", "optimizer__decay_steps": 3}, "0 with the others"),
        ({"training__zero_stge": 1}, "did you mean 'zero_stage'"),
        ({"training__steps": "many"}, "training.steps"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match="(?s).*" + text.replace("(", r"\(")):
        check(TrainConfig, settings(tmp_path, tmp_path, **changes), "test")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("images"), samples=40, frames=1, seed=1)


def buckets(run_dir: Path, *paths: Path | str, budget: int = 108, **changes: Any) -> TrainConfig:
    """8 clips of 4 frames or 36 images per step; `changes` as of `tiny_config`."""
    mixture = [{"path": str(path), "weight": 1} for path in paths]
    data = {"data__path": "", "data__mixture": mixture, "data__mixture_by": "step", "data__tokens_per_batch": budget}
    return tiny_config(run_dir, run_dir, **{**data, **changes})


def test_what_is_wrong_with_buckets_is_told_with_everything_else(
    tmp_path: Path, data: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = buckets(tmp_path / "run", data, images, training__micro_batch_size=1, init_from="/nowhere")
    message = problems(config, 1, monkeypatch)
    assert message.startswith("ConfigError: this run cannot start, 2 problems:")
    assert "init_from" in message
    assert "batches of 8 of [4, 3, 4], 36 of [1, 3, 4] cannot all be cut into 8 micro-batches" in message
    assert "legal training.micro_batch_size: [2, 4, 8], with this one legal numbers of ranks: none" in message
    for micro in (2, 4, 8):
        check_run(buckets(tmp_path, data, images, training__micro_batch_size=micro), 1, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "ranks", "wanted"),
    [
        ({}, 3, ["1 problem:", "cannot all be split over 3 ranks; legal numbers of ranks: [1, 2, 4]"]),
        ({"training__global_batch_size": 4}, 1, ["1 problem:", "that of the longest samples: 8, not 4"]),
        ({"budget": 12}, 1, ["1 problem:", "data.tokens_per_batch=12 holds 1 samples", "legal: at least 48"]),
        (
            {"budget": 144, "training__global_batch_size": 12},
            1,
            ["1 problem:", "images", "40 samples, fewer than one global batch of 48"],
        ),
        (
            {"denoiser__latent_channels": 8},
            1,
            ["2 problems:", "latents of 3 tokens x 4 channels"],
        ),
    ],
)
def test_each_problem_of_buckets_is_named_with_what_is_legal(
    tmp_path: Path,
    data: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    ranks: int,
    wanted: list[str],
) -> None:
    message = problems(buckets(tmp_path, data, images, **changes), ranks, monkeypatch)
    for text in wanted:
        assert text in message


def test_of_buckets_a_missing_dataset_is_the_only_problem(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = problems(buckets(tmp_path, data, "/nowhere"), 3, monkeypatch)
    assert message.startswith("DataError: this run cannot start, 1 problem:")
    assert "/nowhere" in message


def test_micro_batches_of_buckets_are_told(
    tmp_path: Path, data: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ardist.training")
    check_run(buckets(tmp_path, data, images), 1, tmp_path)
    assert caplog.messages == ["4 micro-batches per step and rank, each of 2 clips of 4 frames or 9 clips of 1 frame"]


def test_batches_that_memory_is_not_meant_to_hold_are_refused_before_the_start(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowBuffer, "bytes_for", staticmethod(lambda rows, *_: 2**27 * rows))
    message = problems(tiny_config(tmp_path, data), 2, monkeypatch)
    assert "data: two batches of 4 samples [4, 3, 4] (float16) take 1073741824 bytes, more than data.pref" in message


def write_checkpoint(run_dir: Path, config: TrainConfig, **changes: Any) -> None:
    directory = run_dir / "checkpoints" / "step-00000005"
    directory.mkdir(parents=True)
    values: dict[str, Any] = {
        "step": 5,
        "created": "",
        "world_size": 1,
        "zero_stage": 1,
        "precision": "fp32",
        "parts": (),
        "shapes": {},
        "kinds": (),
        "adam_steps": {},
        "ema_decays": config.training.ema_decays,
        "ema_updates": 0,
        "config": config.model_dump(mode="json"),
        "config_digest": config.digest(),
        "manifest_digest": None,
        "state": {},
        "versions": {},
    }
    commits.write_commit(directory, Commit(**{**values, **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"denoiser__depth": 3}, "denoiser: .*step 5.*depth 2 -> 3"),
        ({"diffusion__target": "v"}, "diffusion.target: .*'x0' -> 'v'"),
        ({"training__ema_decays": [0.9, 0.99]}, r"training.ema_decays: .*\[0.9\] -> \[0.9, 0.99\]"),
        ({"training__ema_decays": [0.99]}, r"\[0.9\] -> \[0.99\]"),
        ({"training__ema_decays": []}, r"\[0.9\] -> \[\]"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    tmp_path: Path, data: Path, changes: dict[str, Any], text: str
) -> None:
    config = tiny_config(tmp_path, data)
    write_checkpoint(tmp_path, config)
    check_run(config, 1, tmp_path / "checkpoints")
    check_run(tiny_config(tmp_path, data, optimizer__lr=1.0), 1, tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=text):
        check_run(tiny_config(tmp_path, data, **changes), 1, tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seed": 1}, "seed: .*step 5.*0 -> 1"),
        ({"data__lanes": 8}, "data.lanes: .*4 -> 8"),
        ({"data__window": 9}, "data.window: .*8 -> 9"),
    ],
)
def test_another_order_of_the_samples_is_refused(
    tmp_path: Path, data: Path, changes: dict[str, Any], text: str
) -> None:
    config = tiny_config(tmp_path, data)
    digest = load_manifest(str(data)).digest()
    order = {"version": 1, "manifest": digest, "seed": 0, "lanes": 4, "window": 8, "epoch": 0, "consumed": 40}
    write_checkpoint(tmp_path, config, state={"data": order}, manifest_digest=digest)
    check_run(config, 1, tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=text):
        check_run(tiny_config(tmp_path, data, **changes), 1, tmp_path / "checkpoints")


def test_another_mixture_of_the_same_datasets_is_refused(tmp_path: Path, data: Path) -> None:
    other = write_latents(tmp_path / "other", samples=16, seed=1)

    def mixed(weight: float, by: str) -> TrainConfig:
        parts = [{"path": str(data), "weight": weight}, {"path": str(other), "weight": 1}]
        return tiny_config(tmp_path, data, data__path="", data__mixture=parts, data__mixture_by=by)

    order = {"version": 1, "mixture": "sample", "weights": [3.0, 1.0], "seed": 0, "lanes": 4, "window": 8}
    write_checkpoint(tmp_path, mixed(3, "sample"), state={"data": order})
    check_run(mixed(3, "sample"), 1, tmp_path / "checkpoints")
    for other_mixture in (mixed(2, "sample"), mixed(3, "step")):
        with pytest.raises(ConfigError, match=r"data.mixture: .*\[3.0, 1.0\].* -> "):
            check_run(other_mixture, 1, tmp_path / "checkpoints")


def test_a_resume_on_another_dataset_is_refused_with_the_other_problems(tmp_path: Path, data: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(tmp_path, data), state={"data": {"seed": 3}}, manifest_digest="f" * 64)
    with pytest.raises(ConfigError, match="(?s)2 problems.*seed: .*data.path: .*dataset ffffffffffff… -> "):
        check_run(tiny_config(tmp_path, data), 1, tmp_path / "checkpoints")


def test_a_section_of_the_other_task_does_not_block_a_resume_but_is_told(tmp_path: Path, data: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(tmp_path, data))
    events.clear()
    check_run(tiny_config(tmp_path, data), 1, tmp_path / "checkpoints")
    assert not events.snapshot()
    changes: dict[str, Any] = {"ar_vae": {"preset": "tiny"}, "augmentation__shift": 1}
    check_run(tiny_config(tmp_path, data, **changes), 1, tmp_path / "checkpoints")
    assert events.snapshot() == {"config.unused_section": 2}
    events.clear()


def test_a_micro_batch_that_does_not_divide_is_told(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="ardist.training")
    check_run(tiny_config(tmp_path, data), 1, tmp_path)
    assert not caplog.messages
    check_run(tiny_config(tmp_path, data, training__micro_batch_size=6), 1, tmp_path)
    assert "micro batches of 4 clips instead of training.micro_batch_size=6" in caplog.messages[0]


def test_latents_of_two_autoencoders_do_not_mix(tmp_path: Path, data: Path) -> None:
    other = write_latents(tmp_path / "other", samples=16, seed=1)
    manifest = load_manifest(str(other))
    assert manifest.vae is not None
    identity = manifest.vae.model_copy(update={"weights_digest": "a" * 64})
    (other / "manifest.json").unlink()
    write_manifest(other, manifest.model_copy(update={"vae": identity}))
    with pytest.raises(
        ConfigError, match="validation.path: its latents are of the AR-VAE aaaaaaaaaaaa…, those of data"
    ):
        check_run(tiny_config(tmp_path, data, validation__path=str(other)), 1, tmp_path)
    parts = [{"path": str(path), "weight": 1} for path in (data, other)]
    with pytest.raises(ConfigError, match="other': its latents are of the AR-VAE aaaaaaaaaaaa…"):
        check_run(tiny_config(tmp_path, data, data__path="", data__mixture=parts), 1, tmp_path)


def test_a_commit_of_another_version_or_with_a_flipped_digit_is_refused(tmp_path: Path, data: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(tmp_path, data))
    directory = tmp_path / "checkpoints" / "step-00000005"
    body = json.loads((directory / commits.COMMIT).read_text())
    for change, text in (
        ({"version": 9}, "format version 9; this release reads version 1"),
        ({"ema_updates": 1}, "its digest does not match"),
        ({"format": "other"}, "is not a commit"),
    ):
        (directory / commits.COMMIT).write_text(json.dumps({**body, **change}))
        with pytest.raises(DataError, match=text):
            commits.read_commit(directory)


def test_the_rank_program_returns_the_exit_code_of_the_error(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings(tmp_path / "run", data)))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main([str(path), "training.stepz=3", "--local_rank=0"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main([str(path), "data.path=/nowhere"]) == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    capsys.readouterr()
    assert main([str(path), "training.stepz=3"]) == 2
    assert capsys.readouterr().err == "", "one message per machine is enough"
    assert "RANK" not in os.environ

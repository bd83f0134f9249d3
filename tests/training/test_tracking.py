"""Trackers can be absent, broken, slow or away: training neither waits nor ends, and it is counted."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from ardist.events import events
from ardist.inference.video_io import write_mp4
from ardist.training import tracking
from ardist.training.tracking import Tracker, open_tracker, run_id


@pytest.fixture(autouse=True)
def _clean_events(monkeypatch: pytest.MonkeyPatch) -> Any:
    # wandb's own processes take their time on a machine that is busy.
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 90.0)
    events.clear()
    yield
    events.clear()


def test_records_arrive_in_order_and_a_broken_tracker_does_not_stop_the_others() -> None:
    seen: list[int] = []
    closed: list[str] = []

    def broken(record: dict[str, Any]) -> None:
        raise RuntimeError("the server said no")

    tracker = Tracker(
        lambda: [
            ("broken", broken, lambda: closed.append("broken")),
            ("good", lambda record: seen.append(record["step"]), lambda: closed.append("good")),
        ]
    )
    for step in range(5):
        tracker.log({"step": step})
    tracker.finish()
    assert seen == [0, 1, 2, 3, 4]
    assert closed == ["good"]
    assert events.snapshot() == {"tracking.failed": 1}


def test_a_tracker_that_hangs_delays_nothing_and_what_it_misses_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "QUEUE_LENGTH", 10)

    def hang() -> list[Any]:
        over.wait(60)
        return []

    over = threading.Event()
    tracker = Tracker(hang)
    for step in range(20):
        tracker.log({"step": step})
    tracker.finish()
    assert tracker._thread.is_alive(), "nobody waited for its end"
    over.set()
    counted = events.snapshot()
    assert counted["tracking.dropped"] >= 10
    assert counted["tracking.unfinished"] == 1


def test_wandb_offline_keeps_its_run_id_and_takes_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_config(tmp_path, tmp_path, tracking__wandb="offline")
    for session in range(2):
        tracker = open_tracker(config, tmp_path)
        tracker.log({"kind": "train", "step": session, "loss": 1.0, "loss_per_frame": [1.0, 2.0], "mfu": None})
        tracker.finish()
    assert events.snapshot() == {}
    # Of two sessions within a second the later folder has a number behind the id.
    ids = {path.name.split("-")[3] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {run_id(tmp_path)}


def wandb_records(path: Path) -> Iterator[Any]:
    """What a ``*.wandb`` file holds: protobuf messages in LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, message = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 2**15 - position % 2**15
        if left < 7:  # the end of a block is too short for a chunk
            position += left
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        if position + 7 + length > len(content):
            return  # still being written
        message += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole message, or the last part of one
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def test_wandb_keeps_what_is_logged_again_from_an_earlier_step_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = open_tracker(tiny_config(tmp_path, tmp_path, tracking__wandb="offline"), tmp_path)
    logged = [(7, 0.5), (8, 0.4), (5, 0.6), (6, 0.55)]
    for step, loss in logged:
        tracker.log({"kind": "train", "step": step, "loss": loss})
    tracker.finish()
    assert events.snapshot() == {}
    [path] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 60
    found = list(wandb_records(path))
    while not any(record.HasField("exit") for record in found):
        assert time.monotonic() < end, "the process that writes the file never closed it"
        time.sleep(0.05)
        found = list(wandb_records(path))
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert [(row["step"], row["train/loss"]) for row in rows] == logged
    assert {
        record.metric.glob_name or record.metric.name: record.metric.step_metric
        for record in found
        if record.HasField("metric")
    }["*"] == "step", "curves are drawn over our own steps"


def test_wandb_takes_pictures_and_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "samples").mkdir()
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    write_mp4(tmp_path / "samples" / "s05-video-00.mp4", frames)
    Image.fromarray(frames[0]).save(tmp_path / "samples" / "frames.png")
    tracker = open_tracker(tiny_config(tmp_path, tmp_path, tracking__wandb="offline"), tmp_path)
    media = {"s05-video-00": "samples/s05-video-00.mp4", "frames": "samples/frames.png", "gone": "samples/gone.mp4"}
    tracker.log({"kind": "samples", "step": 1, "videos": 2, "media": media})
    tracker.finish()
    assert events.snapshot() == {}
    kept = {path.parent.parent.name: path.name for path in (tmp_path / "wandb").rglob("media/*/*/*")}
    assert kept["videos"].startswith("s05-video-00")
    assert kept["images"].startswith("frames")


@pytest.mark.slow
def test_a_server_that_never_answers_costs_a_bounded_wait_and_is_worked_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "START_SECONDS", 3.0)
    with socket.socket() as black_hole:
        black_hole.bind(("127.0.0.1", 0))
        black_hole.listen()
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{black_hole.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        tracker = open_tracker(tiny_config(tmp_path, tmp_path, tracking__wandb="online"), tmp_path)
        tracker.log({"kind": "train", "step": 1, "loss": 1.0})
        assert tracker._queue.qsize() == 1, "the loop does not wait until somebody takes it"
        tracker.finish()
    assert events.snapshot() == {"tracking.offline": 1}
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run_id(tmp_path)}")), "the numbers are kept offline"


def test_a_missing_library_is_said_and_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(tracking.importlib, "import_module", missing)
    tracker = open_tracker(tiny_config(tmp_path, tmp_path, tracking__wandb="online"), tmp_path)
    tracker.log({"step": 1})
    tracker.finish()
    assert events.snapshot() == {"tracking.unavailable": 1}


def test_names_and_numbers_of_a_record() -> None:
    record = {"kind": "validation", "step": 3, "time": 1.0, "loss": 0.5, "by": [1.0, 2.0], "mfu": None, "ok": True}
    assert tracking._scalars(record) == {"validation/loss": 0.5, "validation/by/00": 1.0, "validation/by/01": 2.0}


def test_what_is_unknown_in_a_list_leaves_the_rest_of_it() -> None:
    record = {"kind": "train", "step": 3, "loss_per_timestep": [None, 0.5, 2], "table": [[1.0, None], [2.0, 3.0]]}
    assert tracking._scalars(record) == {"train/loss_per_timestep/01": 0.5, "train/loss_per_timestep/02": 2.0}


@pytest.mark.parametrize(
    ("configured", "asked", "mode"),
    [
        ("online", None, "online"),
        ("online", "offline", "offline"),
        ("online", "disabled", "disabled"),
        ("offline", "online", "offline"),
        ("offline", "disabled", "disabled"),
    ],
)
def test_the_environment_can_keep_wandb_off_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configured: str, asked: str | None, mode: str
) -> None:
    modes: list[str] = []
    run = SimpleNamespace(log=None, finish=lambda: None, define_metric=lambda *names, **options: None)
    wandb = SimpleNamespace(
        Settings=lambda **options: None,
        init=lambda mode, **options: modes.append(mode) or run,
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if asked is not None:
        monkeypatch.setenv("WANDB_MODE", asked)
    open_tracker(tiny_config(tmp_path, tmp_path, tracking__wandb=configured), tmp_path).finish()
    assert modes == ([] if mode == "disabled" else [mode])
    assert not events.snapshot()

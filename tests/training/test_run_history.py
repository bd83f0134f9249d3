"""What a run knows of its past: skips that are read before a checkpoint, and roll-backs that outlive a kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ar_vae_runs import ar_vae_config

from ardist.events import events
from ardist.training import rollbacks, state
from ardist.training.callbacks import Callback, checkpoints, numerics
from ardist.training.callbacks.ar_vae_health import DiscriminatorSkips
from ardist.training.callbacks.checkpoints import Checkpoints
from ardist.training.callbacks.numerics import SkippedSteps
from ardist.training.distributed import World
from ardist.training.engine import StepOutcome
from ardist.training.run_dir import RunDirectory
from ardist.training.state import History
from ardist.training.trainer import Trainer, built_in_callbacks
from ardist.training.window import Window

ALONE = World(0, 1, torch.device("cpu"))
OF_INTEREST = (DiscriminatorSkips, SkippedSteps, Checkpoints)


@pytest.fixture(autouse=True)
def _no_events() -> Iterator[None]:
    events.clear()
    yield
    events.clear()


class Loop:
    """A trainer that only follows the outcomes of steps; the callbacks are the built-in ones, in their order."""

    def __init__(self, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
        settings = {"training__log_every": 100, "checkpoint__every": 2, "training__max_skipped_in_row": 3}
        trainer = self.trainer = object.__new__(Trainer)
        trainer.config = ar_vae_config(run_dir, run_dir, **{**settings, **changes})
        trainer.world, trainer.run, trainer.history = ALONE, RunDirectory(run_dir), History()
        trainer.step, trainer.total_steps, trainer.stopping = 0, trainer.config.training.steps, False
        trainer.epoch, trainer.num_frames, trainer.window = 0, 3, Window()
        trainer.sample_ids, trainer.losses = torch.zeros(1, dtype=torch.int64), [torch.zeros(())]
        scale = SimpleNamespace(value=None, can_fall=False)
        saves: Callable[..., None] = lambda held, **_: self.saved.append(held)  # noqa: E731
        parts: dict[str, Any] = {
            "objective": SimpleNamespace(describe=lambda *_: {}),
            "engine": SimpleNamespace(loss_scale=scale),
            "adversary": SimpleNamespace(skipped_alone=torch.zeros(()), skips_told=0),
            "writer": SimpleNamespace(last_saved=None, waited_seconds=0.0, save=saves, wait=lambda: None),
            "records": SimpleNamespace(write=lambda record: None, write_summary=lambda: None),
        }
        for name, part in parts.items():
            setattr(trainer, name, part)
        self.saved: list[dict[str, Any]] = []
        monkeypatch.setattr(checkpoints, "snapshot", lambda trainer: trainer.history.as_dict())
        self.callbacks: list[Callback] = [c for c in built_in_callbacks(trainer.config) if isinstance(c, OF_INTEREST)]

    def make_step(self, skipped: bool = False, alone: bool = False, stopping: bool = False) -> None:
        """One step whose outcome only the device knows; `alone`: the discriminator skipped it."""
        trainer = self.trainer
        trainer.step += 1
        trainer.outcome, trainer.stopping = StepOutcome(None, torch.tensor(float(skipped))), stopping
        trainer.adversary.skipped_alone += float(alone)  # type: ignore[union-attr]
        for callback in self.callbacks:
            callback.after_step(trainer)


def test_a_checkpoint_between_log_points_holds_every_step_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path, monkeypatch)
    loop.trainer.history.went_back(0)
    loop.make_step(skipped=True, alone=True)
    assert (loop.trainer.history.skipped_steps, events.snapshot()) == (0, {}), "no read where nothing is saved"
    loop.make_step()
    [held] = loop.saved
    assert (held["skipped_steps"], held["good_steps_since"]) == (1, 1)
    assert held["events"] == {"training.skipped_step": 1, "training.skipped_discriminator_step": 1}
    loop.make_step(skipped=True, stopping=True)
    loop.callbacks[-1].on_end(loop.trainer)
    assert loop.saved[-1]["skipped_steps"] == 2


def test_skips_in_a_row_go_on_over_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    went_back: list[int] = []
    monkeypatch.setattr(numerics, "roll_back", lambda trainer: went_back.append(trainer.step) or True)
    first = Loop(tmp_path, monkeypatch)
    first.make_step(skipped=True)
    first.make_step(skipped=True)
    again = Loop(tmp_path, monkeypatch, training__log_every=1)
    again.trainer.step = 2
    again.trainer.history.continue_from(first.saved[0])
    assert went_back == []
    again.make_step(skipped=True)
    assert went_back == [3]
    older = dict(first.saved[0])
    del older["skipped_in_row"], older["rollbacks"]
    history = History()
    history.continue_from(older)
    assert (history.skipped_in_row, history.rollbacks) == (0, 0)


def test_skips_of_the_discriminator_are_told_before_the_run_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(numerics, "roll_back", lambda trainer: told.append(events.snapshot()) or True)
    loop = Loop(tmp_path, monkeypatch, training__max_skipped_in_row=1, checkpoint__every=50)
    loop.make_step(alone=True)
    loop.trainer.outcome = StepOutcome(None, True)
    for callback in loop.callbacks:  # DeepSpeed's own skip, known to the host, between log points
        callback.after_step(loop.trainer)
    assert told[0]["training.skipped_discriminator_step"] == 1


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `state` finds as the newest checkpoint, without its tensors."""
    found = SimpleNamespace(step=3, history=History(useful_seconds=5.0).as_dict())

    def find(*_: Any) -> Any:
        if found.history is None:
            return None
        return Path(), SimpleNamespace(step=found.step, state={"history": found.history})

    monkeypatch.setattr(state.resume, "find", find)
    monkeypatch.setattr(state, "_restore", lambda trainer, *_: None)
    monkeypatch.setattr(state, "_say_resumed", lambda *_: None)
    monkeypatch.setattr(state, "identity_problems", lambda *_: [])
    return found


def resumed(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """The history of a new process on this run directory."""
    events.clear()
    trainer = Loop(run_dir, monkeypatch).trainer
    trainer.store, trainer.ema = None, None  # type: ignore[assignment]
    state.resume_or_begin(trainer)
    return trainer.history


def test_a_run_killed_right_after_it_went_back_knows_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: SimpleNamespace
) -> None:
    trainer = Loop(tmp_path, monkeypatch).trainer
    trainer.store = None  # type: ignore[assignment]
    trainer.step, trainer.history.skipped_steps = 6, 2

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(state, "_restore", killed)
        with pytest.raises(KeyboardInterrupt):
            state.roll_back(trainer)
    history = resumed(tmp_path, monkeypatch)
    assert (history.went_back_from, history.rollbacks, history.skipped_steps, history.sessions) == (6, 1, 2, 2)
    assert (history.earlier_events, history.useful_seconds) == ({"training.rollback": 1}, 5.0)
    # A checkpoint of after that knows it, and more: the record is old.
    history.made_good_step(7)
    store.history = history.as_dict()
    assert resumed(tmp_path, monkeypatch).good_steps_since == 1
    # Nobody has gone back in a run that begins anew in this directory.
    store.history = None
    assert resumed(tmp_path, monkeypatch).rollbacks == 0
    store.history = History().as_dict()
    assert resumed(tmp_path, monkeypatch).went_back_from is None


def test_all_ranks_go_by_what_the_main_one_reads(tmp_path: Path) -> None:
    """Only its directory may be there."""
    path = tmp_path / "rollback.json"
    gone_back = History()
    gone_back.went_back(6)
    rollbacks.record(path, gone_back.as_dict())
    sent: list[Any] = []
    main = SimpleNamespace(is_main=True, broadcast=lambda value: sent.append(value) or value)
    other = SimpleNamespace(is_main=False, broadcast=lambda value: sent[0])
    saved = History().as_dict()
    found = [rollbacks.newer(path, saved, main), rollbacks.newer(tmp_path / "elsewhere", saved, other)]  # type: ignore[arg-type]
    assert [one["went_back_from"] for one in found] == [6, 6]


def test_a_record_that_cannot_be_kept_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "rollback.json"
    rollbacks.record(tmp_path / "nowhere" / path.name, {})
    saved = History().as_dict()
    for text in ("{", "[]", '{"step": 3}'):
        path.write_text(text)
        assert rollbacks.newer(path, saved, ALONE) is saved
    assert events.snapshot() == {"training.rollback_not_recorded": 1, "training.rollback_unreadable": 3}

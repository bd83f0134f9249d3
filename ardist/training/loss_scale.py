"""The dynamic loss scale of fp16 training: its state in a checkpoint, and its floor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """What DeepSpeed's optimiser multiplies fp16 losses with; nothing in other precisions.

    An overflow skips a step and halves the scale. At its floor DeepSpeed would end the run with an exception of no
    name; here the scale stays at the floor, and it is for the caller to see that it does.
    """

    def __init__(self, optimizer: object, precision: str) -> None:
        # ZeRO 1 to 3 have an object of its own for it, ZeRO 0 keeps it among its settings.
        names = ("loss_scaler", "loss_scale_config")
        found = (getattr(optimizer, name, None) for name in names) if precision == "fp16" else ()
        self._scaler: Any = next((scaler for scaler in found if scaler is not None), None)
        if self._scaler is not None and hasattr(self._scaler, "raise_error_at_min_scale"):
            self._scaler.raise_error_at_min_scale = False

    @property
    def value(self) -> float | None:
        """The scale of the next step; None where losses are not scaled."""
        return None if self._scaler is None else float(self._scaler.cur_scale)

    @property
    def can_fall(self) -> bool:
        """Whether the next overflow still has a lower scale to go to."""
        scale = self._scaler
        if scale is None or not (getattr(scale, "dynamic", False) or getattr(scale, "dynamic_loss_scale", False)):
            return False
        floor = getattr(scale, "min_scale", None) or getattr(scale, "min_loss_scale", None) or 1.0
        return float(scale.cur_scale) > float(floor)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it; empty where losses are not scaled."""
        if self._scaler is None:
            return {}
        values = {name: getattr(self._scaler, name, None) for name in FIELDS}
        return {name: float(value) for name, value in values.items() if value is not None}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Continue from a checkpoint; what this kind of scaler does not have is passed over."""
        for name, value in state.items() if self._scaler is not None else ():
            if getattr(self._scaler, name, None) is not None:
                # The first scale is a whole number, later ones need not be.
                setattr(self._scaler, name, float(value) if name == "cur_scale" else int(value))

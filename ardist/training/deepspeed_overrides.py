"""What ``config.deepspeed`` may say: nothing our own settings decide, and nothing DeepSpeed would silently ignore."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ardist.errors import did_you_mean

OWN_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.micro_batch_size",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "data_types": "training.grad_accumulation",
    "zero_optimization.stage": "training.zero_stage",
    "zero_optimization.offload_optimizer": "training.offload",
    "zero_optimization.offload_param": "training.offload",
    "zero_optimization.cpu_offload": "training.offload",
    "zero_optimization.compute_grad_norm": "training.guard",
}
"""Settings of DeepSpeed that are derived from ours, and from which of ours."""

KNOWN_KEYS = frozenset(
    """
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last
    datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue elasticity expert_parallel
    flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op gradient_clipping
    gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown optimizer
    pipeline prescale_gradients progressive_layer_drop scheduler seq_parallel_communication_data_type
    sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism wall_clock_breakdown wandb
    weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
    """.split()  # noqa: SIM905  (one word per quote would be twice as long)
)
"""Settings at the top of a DeepSpeed configuration; DeepSpeed itself ignores every other key without a word."""


def _non_finite(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _non_finite(item)
    elif isinstance(value, float) and not math.isfinite(value):
        yield value


class _Watched(dict[str, Any]):
    """A mapping that remembers which of its keys were asked for, and so do the mappings in it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__({k: _Watched(v) if isinstance(v, Mapping) else v for k, v in values.items()})
        self.asked: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


def nested_problems(overrides: Mapping[str, Any]) -> Iterator[str]:
    """Settings within a section that DeepSpeed refuses, or would pass over without a word.

    DeepSpeed's own reading of a configuration is watched: it takes some sections whole and checks them itself, of the
    others it asks for the settings it knows by their names.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    for section, values in overrides.items():
        if not isinstance(values, Mapping) or section not in KNOWN_KEYS:
            continue
        watched = _Watched({"train_batch_size": 1, section: values})
        try:
            # The constructor wants a process group; the part that reads the settings does not.
            DeepSpeedConfig._initialize_params(object.__new__(DeepSpeedConfig), watched)
        except ValidationError as error:
            for details in error.errors():
                place = ".".join(map(str, (section, *details["loc"])))
                yield f"deepspeed.{place}: {details['msg']}"
        except (ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
            yield f"deepspeed.{section}: DeepSpeed refuses it: {error}"
        asked = dict.__getitem__(watched, section).asked
        for name in values if asked else ():
            if name not in asked:
                yield f"deepspeed.{section}.{name}: DeepSpeed has no such setting{did_you_mean(name, sorted(asked))}"


def override_problems(overrides: Mapping[str, Any]) -> Iterator[str]:
    """Why the overrides of ``config.deepspeed`` cannot be used, one line each."""
    zero = overrides.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f"deepspeed.zero_optimization: a mapping of settings is expected, not {zero!r}"
        zero = {}
    for key, value in overrides.items():
        yield from (f"deepspeed.{key}: {number} is not a finite number" for number in _non_finite(value))
    for key in (*overrides, *(f"zero_optimization.{name}" for name in zero)):
        if key in OWN_KEYS:
            yield f"deepspeed.{key}: this is derived from {OWN_KEYS[key]}; set that instead"
        elif "." not in key and key not in KNOWN_KEYS:
            yield f"deepspeed.{key}: DeepSpeed has no such setting{did_you_mean(key, sorted(KNOWN_KEYS))}"
    if overrides:
        yield from nested_problems(overrides)

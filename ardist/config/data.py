"""Which dataset is read, in which order, and with which limits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ardist.config.base import Section
from ardist.config.paths import PathText


class DatasetShare(Section):
    """One dataset of a mixture."""

    path: PathText = Field(min_length=1, description="dataset folder or s3:// prefix that holds manifest.json")
    weight: float = Field(gt=0, lt=float("inf"), description="share relative to the sum of all weights")


class DataConfig(Section):
    """Which dataset is read and in which order (DATA: fixed lanes)."""

    path: PathText = Field("", description="dataset folder or s3:// prefix that holds manifest.json")
    mixture: tuple[DatasetShare, ...] = Field((), description="several datasets by weight, instead of one path")
    mixture_by: Literal["sample", "step"] = Field(
        "sample", description="step: every step is of one dataset, whose number of frames may be its own"
    )
    tokens_per_batch: int | None = Field(
        None,
        ge=1,
        description="by step: each dataset's batch is what fits of its samples (latents: F x L tokens each, and those "
        "of its context), so that steps of images and of clips cost about the same; training.global_batch_size is that "
        "of the longest samples",
    )
    lanes: int = Field(8, ge=1, description="L, fixed for the life of a run; divides the global batch size")
    window: int = Field(256, ge=1, description="W, samples of one shuffle window of a lane")
    fetch_threads: int = Field(2, ge=1, le=16)
    prefetch_bytes: int = Field(256 * 2**20, ge=2**20, description="bound of all batch buffers of one rank")
    cache_dir: PathText | None = Field(None, description="local cache of remote shards; null: the user's cache folder")
    cache_bytes: int = Field(50 * 2**30, ge=0)
    hedge_after: float = Field(
        4.0,
        ge=0,
        lt=float("inf"),
        description="ask a second time for a remote read that takes so many times longer than others in the median, "
        "for one read in twenty at most; 0: never",
    )
    max_bad_fraction: float = Field(1e-3, ge=0, le=1, description="of the last 10,000 samples; more stops the run")
    missing_shards: Literal["fail", "substitute"] = Field(
        "fail", description="fail: stop at the start and list them; substitute: serve other samples in their place"
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> DataConfig:
        if bool(self.path) == bool(self.mixture):
            raise ValueError("exactly one of data.path and data.mixture names what is read")
        paths = [part.path for part in self.mixture]
        if len(set(paths)) != len(paths):
            raise ValueError("data.mixture names a dataset twice; add its weights instead")
        if self.tokens_per_batch is not None and not (self.mixture and self.mixture_by == "step"):
            raise ValueError("data.tokens_per_batch needs a data.mixture with data.mixture_by: step")
        return self

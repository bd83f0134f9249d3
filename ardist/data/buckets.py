"""Batches of about the same number of tokens from datasets whose samples differ in length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ardist.data.manifest import Manifest
from ardist.data.order import divisors
from ardist.errors import ConfigError


def tokens_of(manifest: Manifest) -> int:
    """Tokens of a sample: F x L of latents [F, L, C], F x H x W of pixels [F, H, W, 3]."""
    return math.prod(manifest.shape[:-1])


def bucket_batches(
    manifests: Sequence[Manifest],
    tokens_per_batch: int,
    *,
    lanes: int,
    world_size: int,
    global_batch_size: int,
) -> tuple[int, ...]:
    """The global batch of every dataset: the largest multiple of the lanes within `tokens_per_batch`.

    It does not depend on the number of ranks, so a run may go on with another one; the ranks must divide all of them.
    `global_batch_size` must be what comes out for the longest samples, so that the two settings never contradict each
    other. Raises `ConfigError` with every problem and the legal values.
    """
    tokens = [tokens_of(manifest) for manifest in manifests]
    batches = tuple(tokens_per_batch // each // lanes * lanes for each in tokens)
    longest = max(range(len(tokens)), key=lambda number: tokens[number])
    if not batches[longest]:
        raise ConfigError(
            f"data.tokens_per_batch={tokens_per_batch} holds {tokens_per_batch // tokens[longest]} samples of "
            f"{list(manifests[longest].shape)} with {tokens[longest]} tokens each, fewer than the {lanes} lanes; "
            f"legal: at least {lanes * tokens[longest]}, or fewer lanes"
        )
    problems = []
    listed = ", ".join(f"{batch} of {list(manifest.shape)}" for batch, manifest in zip(batches, manifests, strict=True))
    if any(batch % world_size for batch in batches):
        problems.append(
            f"batches of {listed} cannot all be split over {world_size} ranks; legal numbers of ranks: "
            f"{divisors(math.gcd(*batches))}, or lanes that are a multiple of the ranks"
        )
    if global_batch_size != batches[longest]:
        problems.append(
            f"data.tokens_per_batch={tokens_per_batch} makes batches of {listed}, and the global batch size is that of "
            f"the longest samples: {batches[longest]}, not {global_batch_size}"
        )
    if problems:
        raise ConfigError("the buckets are not legal: " + "; ".join(problems))
    return batches

"""Batches of about the same number of tokens from datasets whose samples differ in length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ardist.config.training import micro_batches
from ardist.data.manifest import Manifest
from ardist.data.order import divisors
from ardist.errors import ConfigError


def tokens_of(manifest: Manifest) -> int:
    """Tokens of a sample: F x L of latents [F, L, C] and those of its context, F x H x W of pixels [F, H, W, 3]."""
    return math.prod(manifest.shape[:-1]) + (manifest.context_shape[0] if manifest.context_shape else 0)


def bucket_batches(manifests: Sequence[Manifest], tokens_per_batch: int, *, lanes: int) -> tuple[int, ...]:
    """The global batch of every dataset: the largest multiple of the lanes within `tokens_per_batch`.

    It does not depend on the number of ranks, so a run may go on with another one. Raises `ConfigError` where the
    longest samples do not fit once per lane.
    """
    tokens = [tokens_of(manifest) for manifest in manifests]
    batches = tuple(tokens_per_batch // each // lanes * lanes for each in tokens)
    longest = _longest(manifests)
    if not batches[longest]:
        raise ConfigError(
            f"data.tokens_per_batch={tokens_per_batch} holds {tokens_per_batch // tokens[longest]} samples of "
            f"{list(manifests[longest].shape)} with {tokens[longest]} tokens each, fewer than the {lanes} lanes; "
            f"legal: at least {lanes * tokens[longest]}, or fewer lanes"
        )
    return batches


def check_buckets(
    manifests: Sequence[Manifest],
    batches: Sequence[int],
    *,
    world_size: int,
    global_batch_size: int,
    micro_batch_size: int | None = None,
) -> None:
    """Refuse what cannot be done with the `batches` of `bucket_batches`; `ConfigError` with every problem.

    The ranks must divide all of them. `global_batch_size` must be that of the longest samples, so that the two
    settings never contradict each other. `micro_batch_size`: what a rank cuts that one into; then every other batch
    must be divisible into as many equal parts.
    """
    longest, problems = _longest(manifests), []
    ranks = [count for count in divisors(math.gcd(*batches)) if not _uncut(batches, longest, count, micro_batch_size)]
    listed = ", ".join(f"{batch} of {list(manifest.shape)}" for batch, manifest in zip(batches, manifests, strict=True))
    if any(batch % world_size for batch in batches):
        problems.append(
            f"batches of {listed} cannot all be split over {world_size} ranks; legal numbers of ranks: "
            f"{ranks or 'none'}, or lanes that are a multiple of the ranks"
        )
    elif parts := _uncut(batches, longest, world_size, micro_batch_size):
        each = batches[longest] // world_size
        common = math.gcd(*(batch // world_size for batch in batches))
        problems.append(
            f"a rank's parts of batches of {listed} cannot all be cut into {parts} micro-batches, as those of the "
            f"longest samples are with training.micro_batch_size={micro_batch_size} on {world_size} ranks; legal "
            f"training.micro_batch_size: {sorted(each // count for count in divisors(common))}, with this one legal "
            f"numbers of ranks: {ranks or 'none'}, or lanes that are a multiple of {world_size * parts}"
        )
    if global_batch_size != batches[longest]:
        problems.append(
            f"data.tokens_per_batch makes batches of {listed}, and the global batch size is that of the longest "
            f"samples: {batches[longest]}, not {global_batch_size}"
        )
    if problems:
        raise ConfigError("the buckets are not legal: " + "; ".join(problems))


def _longest(manifests: Sequence[Manifest]) -> int:
    return max(range(len(manifests)), key=lambda number: tokens_of(manifests[number]))


def _uncut(batches: Sequence[int], longest: int, ranks: int, micro_batch_size: int | None) -> int:
    """The number of micro-batches on so many ranks, where not all batches can be cut into as many; else 0."""
    if micro_batch_size is None:
        return 0
    parts = micro_batches(batches[longest] // ranks, micro_batch_size)[1]
    return parts if any(batch // ranks % parts for batch in batches) else 0

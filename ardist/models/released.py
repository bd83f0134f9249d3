"""From a state dict of the published layout to ours.

================================  ===============================  ====================================
published key                     ours                             change
================================  ===============================  ====================================
``x_embedder``                    ``input``                        none
``t_embedder.mlp.0``, ``.2``      ``timestep.hidden``, ``.output`` none
``y_embedder.embedding_table``    ``classes``                      a missing null row: class 0 again
``c_embedder``                    ``context.projection``           none
(none)                            ``context.null``                 zeros
``pos_embed`` [1, F*L, w]         ``position_table`` [F*L, w]      leading axis dropped
``blocks.N.adaLN_modulation.1``   ``blocks.N.modulation``          none
``blocks.N.attn.qkv``             ``blocks.N.qkv``                 rope: channels of a head reordered
``blocks.N.attn.q_norm, k_norm``  ``blocks.N.qk_norm`` [2, 1, d]   stacked; rope: channels reordered
``blocks.N.attn.proj``            ``blocks.N.projection``          none
``blocks.N.mlp.fc1``, ``.fc2``    ``blocks.N.mlp_hidden, _output`` none
``final_layer.1``                 ``output``                       none
``…rotary_emb.freqs``             (computed)                       checked against theta = 1e4, dropped
================================  ===============================  ====================================

Published rotary pairs are neighbours, (0, 1), (2, 3), …; ours are (j, j + d/2). Once the channels of q and k are
reordered alike, all dot products are the same, so the reordering is done here and not at every step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ardist.config.denoiser import DenoiserConfig
from ardist.errors import CheckpointError
from ardist.models.positions import RELEASED_THETA

_RENAMED = {
    r"x_embedder": "input",
    r"t_embedder\.mlp\.0": "timestep.hidden",
    r"t_embedder\.mlp\.2": "timestep.output",
    r"c_embedder": "context.projection",
    r"blocks\.(\d+)\.adaLN_modulation\.1": r"blocks.\1.modulation",
    r"blocks\.(\d+)\.attn\.qkv": r"blocks.\1.qkv",
    r"blocks\.(\d+)\.attn\.proj": r"blocks.\1.projection",
    r"blocks\.(\d+)\.mlp\.fc1": r"blocks.\1.mlp_hidden",
    r"blocks\.(\d+)\.mlp\.fc2": r"blocks.\1.mlp_output",
    r"final_layer\.1": "output",
}
_QK_NORM = re.compile(r"blocks\.(\d+)\.attn\.(q|k)_norm\.(weight|bias)")


def convert_released_state_dict(published: Mapping[str, Tensor], config: DenoiserConfig) -> dict[str, Tensor]:
    """The state dict of ``Denoiser(config)`` that computes what the published weights compute.

    Args:
        published: tensors by their published names, as in the table of this module.
        config: the architecture they belong to (published checkpoints: ``preset("released-xl")``).

    Raises:
        CheckpointError: a key is unknown, a part is missing, the class table has another number of rows than the
            configuration, or the rotary frequencies are others than ours.
    """
    converted: dict[str, Tensor] = {}
    qk_norm: dict[tuple[str, str], dict[str, Tensor]] = {}
    rope = config.positions == "rope_1d"
    for key, value in published.items():
        norm = _QK_NORM.fullmatch(key)
        if norm is not None:
            qk_norm.setdefault((norm[1], norm[3]), {})[norm[2]] = _pairs_to_halves(value, value.numel(), rope)
        elif key.endswith("rotary_emb.freqs"):
            _check_frequencies(key, value)
        elif key == "pos_embed":
            converted["position_table"] = value[0]
        elif key == "y_embedder.embedding_table.weight":
            converted["classes.weight"] = _with_null_class(value, config)
        else:
            name = _rename(key)
            if ".qkv." in name:
                value = _reorder_qkv(value, config, rope)
            converted[name] = value
    for (block, kind), parts in qk_norm.items():
        if len(parts) != 2:
            raise CheckpointError(f"blocks.{block}.attn has only one of q_norm and k_norm ({kind}); legal: both")
        converted[f"blocks.{block}.qk_norm.{kind}"] = torch.stack([parts["q"], parts["k"]])[:, None]
    if config.context_tokens:
        weight = published.get("c_embedder.weight")
        if weight is None:
            raise CheckpointError("c_embedder.weight is missing, but the configuration has context tokens")
        converted["context.null"] = weight.new_zeros(config.context_tokens, config.context_dim)
    return converted


def _rename(key: str) -> str:
    stem, _, kind = key.rpartition(".")
    if kind in ("weight", "bias"):
        for pattern, ours in _RENAMED.items():
            if re.fullmatch(pattern, stem):
                return f"{re.sub(pattern, ours, stem)}.{kind}"
    raise CheckpointError(
        f"{key!r} is no key of the published denoiser layout; see ardist.models.released for the list"
    )


def _pairs_to_halves(value: Tensor, head_dim: int, rope: bool) -> Tensor:
    """Reorder the channels of each head on the first axis: evens first, then odds."""
    if not rope:
        return value
    pairs: Tensor = value.unflatten(0, (-1, head_dim // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def _reorder_qkv(value: Tensor, config: DenoiserConfig, rope: bool) -> Tensor:
    if len(value) != 3 * config.width:
        raise CheckpointError(f"an attn.qkv has {len(value)} rows; legal for width {config.width}: {3 * config.width}")
    q, k, v = value.chunk(3)
    return torch.cat([_pairs_to_halves(q, config.head_dim, rope), _pairs_to_halves(k, config.head_dim, rope), v])


def _check_frequencies(key: str, value: Tensor) -> None:
    expected = RELEASED_THETA ** (-torch.arange(len(value), dtype=torch.float64) / len(value))
    if not torch.allclose(value.double().cpu(), expected, rtol=1e-4, atol=1e-7):
        raise CheckpointError(
            f"{key} holds other frequencies than theta = {RELEASED_THETA:g}; these weights cannot run"
        )


def _with_null_class(table: Tensor, config: DenoiserConfig) -> Tensor:
    """The published null id was that of class 0, so where the table has no row for it, class 0 stands in."""
    classes, rows = config.num_classes, len(table)
    if classes is None or rows not in (classes, classes + 1):
        raise CheckpointError(
            f"the class table has {rows} rows, which num_classes={classes} does not fit; "
            f"legal: num_classes={rows - 1} (the last row is for no class) or {rows} (class 0 stands for none)"
        )
    return table if rows == classes + 1 else torch.cat([table, table[:1]])

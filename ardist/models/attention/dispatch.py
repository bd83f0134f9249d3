"""One attention function, several backends: chosen by name or by a rule."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from ardist.errors import InvalidValueError, choose
from ardist.models.attention import reference
from ardist.models.attention.layout import AttentionLayout

_ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]] = {"reference": reference.attend}
BACKENDS = ("auto", *_ATTEND)


def attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h m d"],
    v: Float[Tensor, "b h m d"],
    layout: AttentionLayout,
    backend: str = "auto",
) -> Float[Tensor, "b h n d"]:
    """Softmax attention with scale 1/sqrt(d) under the mask of `layout`, by the named backend.

    Raises:
        InvalidValueError: shapes disagree with the layout, or the backend is unknown or cannot do this.
    """
    if q.shape[2] != layout.num_queries or k.shape[2] != layout.num_keys:
        raise InvalidValueError(
            f"q has {q.shape[2]} tokens and k has {k.shape[2]}; "
            f"legal for this layout: {layout.num_queries} and {layout.num_keys}"
        )
    return _ATTEND[resolve_backend(backend, layout, q)](q, k, v, layout)


def resolve_backend(name: str, layout: AttentionLayout, q: Float[Tensor, "b h n d"]) -> str:
    """The backend that `name` stands for here: `name` itself, or the choice of ``auto``."""
    choose("attention backend", name, BACKENDS)
    return "reference" if name == "auto" else name

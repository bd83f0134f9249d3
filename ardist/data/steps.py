"""What a rank reads for one optimiser step, and for a block of consecutive ones that are read together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ardist.data.batch import Rows
from ardist.data.dataset_stream import Taken
from ardist.data.health import Substitution
from ardist.data.order import Places


class Piece(NamedTuple):
    """Places of one dataset and epoch that fill consecutive rows of a batch, beginning with `slot`."""

    dataset: int
    epoch: int
    taken: Taken
    slot: int

    @property
    def places(self) -> Places:
        """Where they are."""
        return self.taken.places

    @property
    def rows(self) -> slice:
        """The rows of the batch that it fills."""
        return slice(self.slot, self.slot + len(self.taken))


@dataclass
class Step:
    """What one rank reads for one optimiser step. `after`: the position once it is consumed.

    samples: where its rows are, once they are read. failure: why they could not be; whoever asks for the step meets it.
    """

    pieces: list[Piece]
    epoch: int
    after: Any
    substitutions: dict[int, Substitution] = field(default_factory=dict)
    samples: Rows | None = None
    failure: Exception | None = None


@dataclass
class Block:
    """Consecutive steps that are planned and read together.

    pieces: what the rows of all steps are read from; of one step its own pieces. in_windows: whether windows are held
    for the block. served_in_place: whether steps are served from them, so that they are held until that is over.
    """

    steps: list[Step]
    pieces: list[Piece]
    in_windows: bool = False
    served_in_place: bool = False

    @property
    def after(self) -> Any:
        """The position once all of it is consumed."""
        return self.steps[-1].after


def one_step(step: Step) -> Block:
    """A block of nothing but this step."""
    return Block([step], step.pieces)


def uniform_block(piece: Piece, after: list[Any]) -> Block:
    """Steps of one dataset and epoch, one for each of the piece's batches; after: the position behind each of them."""
    steps = [
        Step([Piece(piece.dataset, piece.epoch, piece.taken.one(number), 0)], piece.epoch, position)
        for number, position in enumerate(after)
    ]
    return Block(steps, [piece])

"""Conversations → padded or packed tensors in a fixed order.

Place in the flow: dataset → **batches** → loop. One rule: the order of epoch e depends on the seed and e alone, so a resumed
run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler

from gateway.chat.render import IGNORED, TrainingSequence
from trainer.data.examples import Examples

_BATCHES_SORTED_TOGETHER = 16
FILLER = "filler"  # in a pass that only keeps this rank in step with the others: its loss counts nothing
_PAD = 0  # any id will do: padding is on the right, and no position looks to its right


def pad(sequences: Sequence[TrainingSequence]) -> dict[str, torch.Tensor]:
    """input_ids and labels, both (sequences, longest)."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.full((len(sequences), longest), _PAD, dtype=torch.long)
    labels = torch.full((len(sequences), longest), IGNORED, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.ids)] = torch.tensor(sequence.ids)
        labels[row, : len(sequence.labels)] = torch.tensor(sequence.labels)
    return {"input_ids": ids, "labels": labels}


def pack(sequences: Sequence[TrainingSequence], width: int | None = None) -> dict[str, torch.Tensor]:
    """As `pad`, with short sequences sharing a row, and what keeps them apart: position_ids that begin anew, and owners.

    `owners` has the number of each position's sequence. A row is as long as the longest sequence, so that attention costs no
    more than padded, or `width` where that is longer.
    """
    width = max(width or 0, *(len(sequence.ids) for sequence in sequences))
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sequences)), key=lambda n: -len(sequences[n].ids)):  # the longest first
        size = len(sequences[number].ids)
        place = next((row for row, left in enumerate(room) if left >= size), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(width)
        rows[place].append(number)
        room[place] -= size
    shape = (len(rows), width - min(room))
    ids, labels = torch.full(shape, _PAD, dtype=torch.long), torch.full(shape, IGNORED, dtype=torch.long)
    positions, owners = torch.arange(shape[1]).repeat(len(rows), 1), torch.zeros(shape, dtype=torch.long)
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            sequence = sequences[number]
            end = start + len(sequence.ids)
            ids[row, start:end] = torch.tensor(sequence.ids)
            labels[row, start:end] = torch.tensor(sequence.labels)
            labels[row, start] = IGNORED  # nothing stands before it
            positions[row, start:] = torch.arange(shape[1] - start)
            owners[row, start:] = number
            start = end
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "owners": owners}


def owners(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, length): the number of the sequence that each position belongs to."""
    ids = inputs["input_ids"]
    return inputs.get("owners", torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids))


def take_apart(inputs: dict[str, torch.Tensor]) -> list[TrainingSequence]:
    """The sequences of a pass in their order, each up to its last trained token."""
    ids, labels, owner = inputs["input_ids"], inputs["labels"], owners(inputs)
    found = []
    for number in range(int(owner.max()) + 1):
        own = owner == number
        own_labels = labels[own]
        end = int((own_labels != IGNORED).nonzero().max()) + 1 if (own_labels != IGNORED).any() else 0
        found.append(TrainingSequence(ids[own][:end].tolist(), own_labels[:end].tolist()))
    return found


def collate(
    examples: Examples, numbers: Sequence[int], *, packed: bool = False, width: int | None = None
) -> dict[str, torch.Tensor]:
    """Conversations as one pass: their sequences, padded or packed, and which of them are desirable."""
    sequences = [sequence for number in numbers for sequence in examples.sequences(number)]
    desirable = torch.tensor([bool(examples.desirable[number]) for number in numbers])
    return {**(pack(sequences, width) if packed else pad(sequences)), "desirable": desirable}


class EpochOrder(Sampler[list[int]]):
    """Batches of conversation numbers, shuffled anew each epoch; a batch comes in passes of `pass_size`.

    With several ranks each has its share of every batch, in as many passes as the others: one that has nothing left gets a
    filler, a conversation whose number is past the last one's.

    Conversations of like length share a batch: each stretch of some batches is sorted by length, then the batches are
    shuffled. On short requests to an assistant that saves a fifth of the work, which was padding.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, pass_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        """`pass_size` divides a rank's share of `batch_size`."""
        self.lengths, self.batch_size, self.pass_size, self.seed = lengths, batch_size, pass_size, seed
        self.rank, self.world = rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, short = divmod(len(self.lengths), self.batch_size)
        return full * self._count_passes(self.batch_size) + self._count_passes(short)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches(self.epoch):
            share = batch[self.rank :: self.world]  # of like length on all ranks: a batch is sorted
            for number in range(self._count_passes(len(batch))):
                start = number * self.pass_size
                yield share[start : start + self.pass_size] or [batch[0] + len(self.lengths)]

    def first_batch(self) -> list[int]:
        """What the first step of all trains on, on all ranks together."""
        return self._batches(epoch=0)[0]

    def _count_passes(self, size: int) -> int:
        """How many passes a batch of `size` conversations takes, the same on every rank."""
        return math.ceil(math.ceil(size / self.world) / self.pass_size)

    def _batches(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        stretch = self.batch_size * _BATCHES_SORTED_TOGETHER
        order = [
            number
            for start in range(0, len(order), stretch)
            for number in sorted(order[start : start + stretch], key=self.lengths.__getitem__)
        ]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        short = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # stays last: steps count full batches
        return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()] + short


class Batches(DataLoader[dict[str, torch.Tensor]]):
    """Passes of conversations, with their `numbers`; all sequences of a conversation are in the same one."""

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        pass_size: int,
        seed: int,
        *,
        packed: bool = False,
        width: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.order = EpochOrder(examples.lengths(), batch_size, pass_size, seed, rank, world)

        def make_pass(numbers: list[int]) -> dict[str, torch.Tensor]:
            own = [number % len(examples) for number in numbers]
            made = {**collate(examples, own, packed=packed, width=width), "numbers": torch.tensor(own)}
            return made if own == numbers else {**made, FILLER: torch.tensor(True)}

        super().__init__(
            range(2 * len(examples)),  # see EpochOrder
            batch_sampler=self.order,
            collate_fn=make_pass,
            generator=torch.Generator(),  # else each epoch draws from the one that dropout goes by
        )

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)


def fitting_pass_size(batch_size: int, longest: int, token_budget: int) -> int:
    """How many conversations fit one pass: the largest divisor of `batch_size` that keeps to the budget of tokens.

    `longest` is what a conversation needs at the most, all its sequences padded alike.
    """
    return next(
        size
        for size in range(batch_size, 0, -1)
        if batch_size % size == 0 and (size * longest <= token_budget or size == 1)
    )

"""Conversations → padded tensors in a fixed order.

Place in the flow: dataset → **batches** → loop. One rule: the order of epoch e depends on the seed and e alone, so a resumed
run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Sampler

from gateway.chat.render import IGNORED, TrainingSequence
from trainer.examples import Examples

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
        for batch in self._batches():
            share = batch[self.rank :: self.world]  # of like length on all ranks: a batch is sorted
            for number in range(self._count_passes(len(batch))):
                start = number * self.pass_size
                yield share[start : start + self.pass_size] or [batch[0] + len(self.lengths)]

    def _count_passes(self, size: int) -> int:
        """How many passes a batch of `size` conversations takes, the same on every rank."""
        return math.ceil(math.ceil(size / self.world) / self.pass_size)

    def _batches(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
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
    """Padded passes of conversations; all sequences of a conversation are in the same one."""

    def __init__(
        self, examples: Examples, batch_size: int, pass_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.order = EpochOrder(examples.lengths(), batch_size, pass_size, seed, rank, world)
        super().__init__(
            range(2 * len(examples)),
            batch_sampler=self.order,
            collate_fn=lambda numbers: _collate(examples, numbers),
        )

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)


def _collate(examples: Examples, numbers: list[int]) -> dict[str, torch.Tensor]:
    """A padded pass. A number past the last conversation is a filler's: another rank trains on it (see FILLER)."""
    count = len(examples)
    inputs = pad([sequence for number in numbers for sequence in examples.sequences(number % count)])
    return inputs | {FILLER: torch.tensor(True)} if numbers[0] >= count else inputs


def fitting_pass_size(batch_size: int, longest: int, token_budget: int = 16_384) -> int:
    """How many conversations fit one pass: the largest divisor of `batch_size` that keeps to the budget of tokens."""
    return next(
        size
        for size in range(batch_size, 0, -1)
        if batch_size % size == 0 and (size * longest <= token_budget or size == 1)
    )

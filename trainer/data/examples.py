"""Tokenised conversations as flat arrays, on the disk and mapped into memory.

Place in the flow: dataset → **examples** → batches. The check writes a folder of them for each input file as it validates, so
nothing is rendered twice; the trainer, in as many processes as it has, maps it. One rule: a folder is whole or absent, and is
opened only by the identity that it was written under, so that what is stale is never trained on.

    examples.json     {"identity": …, "sequences": …, "tokens": …, "conversations": …}
    ids               int32, all sequences one after another
    trained           one byte an id: 1 where it is also the label
    starts            int64: sequence s is ids[starts[s]:starts[s + 1]]
    conversations     int64: conversation c is the sequences conversations[c]:conversations[c + 1]
    desirable         one byte a conversation, for kto: 1 where its reply is to become likelier
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gateway.chat.render import IGNORED, TrainingSequence
from gateway.jobdir import read_json
from trainer.export.folder import complete_folder

_ABOUT = "examples.json"
_KINDS: dict[str, Any] = {
    "ids": np.int32,
    "trained": np.bool_,
    "starts": np.int64,
    "conversations": np.int64,
    "desirable": np.bool_,
}


class StaleExamples(LookupError):
    """There are no examples of this identity in the folder: they are to be written (again)."""


@dataclass(frozen=True)
class Examples:
    """Conversations to train on. Of `dpo` and `orpo` each is a pair: two sequences, the chosen and then the rejected reply."""

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    conversations: npt.NDArray[np.int64]
    desirable: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls, conversations: Iterable[Sequence[TrainingSequence]], desirable: Iterable[bool] | None = None
    ) -> Examples:
        """The same in memory; every one is desirable unless it is said."""
        ids, trained, starts, ends = array("i"), bytearray(), [0], [0]
        for sequences in conversations:
            for sequence in sequences:
                ids.extend(sequence.ids)
                trained += (np.array(sequence.labels) != IGNORED).tobytes()
                starts.append(len(ids))
            ends.append(len(starts) - 1)
        flags = [True] * (len(ends) - 1) if desirable is None else list(desirable)
        return cls(
            np.array(ids, np.int32),
            np.frombuffer(trained, np.bool_),
            np.array(starts, np.int64),
            np.array(ends, np.int64),
            np.array(flags, np.bool_),
        )

    def __len__(self) -> int:
        """How many conversations there are."""
        return len(self.conversations) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def spans(self, conversation: int) -> list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]]:
        """(ids, trained) of each sequence of a conversation: views, not copies."""
        first, last = self.conversations[conversation], self.conversations[conversation + 1]
        borders = self.starts[first : last + 1].tolist()
        return [(self.ids[a:b], self.trained[a:b]) for a, b in pairwise(borders)]

    def sequences(self, conversation: int) -> list[TrainingSequence]:
        """The sequences of a conversation, as they were rendered."""
        return [
            TrainingSequence(ids.tolist(), np.where(trained, ids, IGNORED).tolist())
            for ids, trained in self.spans(conversation)
        ]

    def first_reply(self, conversation: int) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of what is learnt after it, up to what is not: of one that is learnt whole, its two halves."""
        ids, trained = self.spans(conversation)[0]
        first = int(trained.argmax()) or len(ids) // 2
        rest = trained[first:]
        last = len(ids) if rest.all() else first + int(rest.argmin())
        return ids[:first].tolist(), ids[first:last].tolist()

    def lengths(self) -> array[int]:
        """The longest sequence of each conversation."""
        found = array("q")
        if len(self):
            found.frombytes(np.maximum.reduceat(np.diff(self.starts), self.conversations[:-1]).tobytes())
        return found


class ExamplesWriter:
    """Takes conversations piece by piece; memory does not grow with them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, BinaryIO] = {
            name: stack.enter_context((folder / name).open("wb", buffering=1 << 20)) for name in _KINDS
        }
        self.n_tokens = self.n_sequences = self.n_conversations = 0
        for name in ("starts", "conversations"):
            self._files[name].write(bytes(8))  # a zero

    def extend(self, examples: Examples) -> None:
        """Conversations that come after those before."""
        for name, values in (
            ("ids", examples.ids),
            ("trained", examples.trained),
            ("starts", examples.starts[1:] + self.n_tokens),
            ("conversations", examples.conversations[1:] + self.n_sequences),
            ("desirable", examples.desirable),
        ):
            self._files[name].write(values.tobytes())
        self.n_tokens += len(examples.ids)
        self.n_sequences += len(examples.starts) - 1
        self.n_conversations += len(examples)


@contextmanager
def write_examples(folder: Path, identity: str) -> Iterator[ExamplesWriter]:
    """A writer whose folder appears, whole and on the disk, when the block ends without an error."""
    with complete_folder(folder) as beside:
        with ExitStack() as stack:
            writer = ExamplesWriter(beside, stack)
            yield writer
        about = {
            "identity": identity,
            "tokens": writer.n_tokens,
            "sequences": writer.n_sequences,
            "conversations": writer.n_conversations,
        }
        (beside / _ABOUT).write_text(json.dumps(about, indent=1))


def open_examples(folder: Path, identity: str) -> Examples:
    """What was written there under this identity, mapped. Raises StaleExamples."""
    try:
        about = read_json(folder / _ABOUT)
    except FileNotFoundError as error:
        raise StaleExamples(f"{folder} has no examples") from error
    if about["identity"] != identity:
        raise StaleExamples(f"{folder} has the examples of another file, template or options")
    tokens, sequences, conversations = about["tokens"], about["sequences"], about["conversations"]
    counts = (tokens, tokens, sequences + 1, conversations + 1, conversations)
    return Examples(
        *(_mapped(folder / name, kind, count) for (name, kind), count in zip(_KINDS.items(), counts, strict=True))
    )


def _mapped(path: Path, kind: Any, count: int) -> npt.NDArray[Any]:
    expected, found = count * np.dtype(kind).itemsize, path.stat().st_size
    if found != expected:
        raise StaleExamples(f"{path} has {found} bytes in place of {expected}")
    if not count:  # nothing can be mapped of an empty file
        return np.empty(0, kind)
    return np.memmap(path, kind, mode="r", shape=(count,)).view(np.ndarray)  # a plain array is quicker to slice

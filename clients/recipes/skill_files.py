"""Skill files: what a voice assistant can do, shown by examples. Parsing, de-duplicating, holding out.

Place in the flow: the first step of `clients.recipes.skills`. One rule: a line that makes no sense is an error that
names file and line; nothing is dropped in silence.

    #### Prompt:            what the skill is, in words
    #### Prompt Examples:   a few pairs
    #### Examples:          more pairs
    ### User: a request
    ### Assistant: the call that answers it

The three hashes before `User:` and `Assistant:` may be missing.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clients.recipes.calls import Call, parse_call

_HEADING = re.compile(r"####\s*(?P<title>[^:]*?)\s*:\s*$")
_TURN = re.compile(r"(?:###\s*)?(?P<role>User|Assistant)\s*:\s*(?P<text>.*)$")
_TITLES = ("Prompt", "Prompt Examples", "Examples")


class SkillFileError(ValueError):
    """A skill file that cannot be read; the message starts with `file:line:`."""


@dataclass(frozen=True)
class SkillExample:
    """A request and the call that answers it; `skill` is the called function's name."""

    skill: str
    request: str
    answer: str

    @property
    def values(self) -> tuple[str, ...]:
        """The argument values of the answer."""
        call = parse_call(self.answer)
        return tuple(call.arguments.values()) if call else ()


@dataclass(frozen=True)
class Split:
    """What is trained on, and what is asked afterwards."""

    training: list[SkillExample]
    held_out: list[SkillExample]


def read_folder(folder: Path) -> list[SkillExample]:
    """The examples of every .txt file in FOLDER, each request once. Raises SkillFileError."""
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise SkillFileError(f"{folder}: no skill files (*.txt) here")
    return deduplicated(example for path in paths for example in read_file(path))


def read_file(path: Path) -> list[SkillExample]:
    """The examples of one skill file, in order. Raises SkillFileError naming file and line."""
    section: str | None = None
    asked: tuple[int, str] | None = None
    found: list[SkillExample] = []
    number = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text:
            continue
        heading, turn = _HEADING.match(text), _TURN.match(text)
        if heading:
            if asked:
                raise SkillFileError(f"{path}:{asked[0]}: this User line has no Assistant line after it")
            section = heading["title"]
            if section not in _TITLES:
                raise SkillFileError(f"{path}:{number}: unknown heading '{section}'; it may be {', '.join(_TITLES)}")
        elif section == "Prompt" and not text.startswith("#"):
            continue
        elif section in _TITLES[1:] and turn:
            asked = _take_turn(path, number, turn["role"], turn["text"], asked, found)
        else:
            raise SkillFileError(f"{path}:{number}: {_complaint(section, text)}")
    if asked:
        raise SkillFileError(f"{path}:{asked[0]}: this User line has no Assistant line after it")
    if not found:
        raise SkillFileError(f"{path}:{number}: the file ends without a single example")
    return found


def deduplicated(examples: Iterable[SkillExample]) -> list[SkillExample]:
    """The first example of each request; case and surrounding punctuation make no difference."""
    seen: dict[str, SkillExample] = {}
    for example in examples:
        seen.setdefault(_plain(example.request), example)
    return list(seen.values())


def split(examples: Sequence[SkillExample], share: float, seed: int, unseen_values: bool) -> Split:
    """Holds SHARE of each skill's examples out, the same ones for the same seed.

    With `unseen_values` only examples qualify whose argument values stand nowhere else in the set, so that no
    held-out value occurs in the training file; a skill without enough of those gives as many as it has.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must be between 0 and 1, not {share}")
    rng = random.Random(seed)
    chosen: set[int] = set()
    by_skill: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_skill.setdefault(example.skill, []).append(index)
    texts = [_plain(f"{example.request} {example.answer}") for example in examples]
    for _, indexes in sorted(by_skill.items()):
        fit = [index for index in indexes if not unseen_values or _is_fresh(examples[index], index, texts)]
        wanted = min(math.ceil(len(indexes) * share), len(indexes) - 1)
        chosen.update(rng.sample(fit, min(wanted, len(fit))))
    training = [example for index, example in enumerate(examples) if index not in chosen]
    rng.shuffle(training)
    return Split(training, [examples[index] for index in sorted(chosen)])


def occurs(value: str, text: str) -> bool:
    """Whether VALUE stands in TEXT as whole words, whatever their case and punctuation."""
    return f" {_plain(value)} " in f" {_plain(text)} "


def _take_turn(
    path: Path, number: int, role: str, text: str, asked: tuple[int, str] | None, found: list[SkillExample]
) -> tuple[int, str] | None:
    if not text.strip():
        raise SkillFileError(f"{path}:{number}: this {role} line is empty")
    if role == "User":
        if asked:
            raise SkillFileError(f"{path}:{asked[0]}: this User line has no Assistant line after it")
        return number, text.strip()
    if not asked:
        raise SkillFileError(f"{path}:{number}: this Assistant line has no User line before it")
    call: Call | None = parse_call(text)
    if call is None:
        raise SkillFileError(f'{path}:{number}: {text.strip()!r} is no call such as name(key="value")')
    found.append(SkillExample(call.name, asked[1], text.strip()))
    return None


def _complaint(section: str | None, text: str) -> str:
    if section is None:
        return f"{text!r} stands before the first heading; a file starts with '#### Prompt:'"
    return f"{text!r} is neither a heading nor a line such as '### User: …' or '### Assistant: …'"


def _is_fresh(example: SkillExample, index: int, texts: Sequence[str]) -> bool:
    others = [text for other, text in enumerate(texts) if other != index]
    return not any(occurs(value, text) for value in example.values for text in others)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))

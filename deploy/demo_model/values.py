"""Things that a request may name, and requests that name them: the raw material of every task in `corpus`.

One rule: a value is random enough that nothing but copying it from the request can get it right.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from deploy.demo_model import words
from deploy.demo_model.tokenizer import invented_word
from deploy.demo_model.words import split_lines

LISTED = sorted(
    {*words.THINGS, *words.ADJECTIVES, *words.VERBS, *words.ANIMALS, *words.FRUITS, *words.FOODS, *words.TOOLS}
)


def value(rng: random.Random) -> str:
    """One to six words or numbers that could fill a slot: a name, a title, a place, a chore, a code, a time."""
    maker = rng.choices(_MAKERS, _WEIGHTS)[0]
    return maker(rng)


def distinct_values(rng: random.Random, count: int) -> list[str]:
    """Values none of which holds another, so that each can be pointed at."""
    found: list[str] = []
    while len(found) < count:
        candidate = value(rng)
        if all(candidate not in other and other not in candidate for other in found):
            found.append(candidate)
    return found


def invented(rng: random.Random) -> str:
    words_count = rng.choices((1, 2, 3), (6, 3, 1))[0]
    parts = [invented_word(rng) for _ in range(words_count)]
    return " ".join(part.capitalize() for part in parts) if rng.random() < 0.55 else " ".join(parts)


def letters(rng: random.Random) -> str:
    """Letters in no order at all, so that every piece gets its turn."""
    parts = [
        "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 8)))
        for _ in range(rng.choice((1, 1, 2)))
    ]
    return " ".join(part.capitalize() if rng.random() < 0.4 else part for part in parts)


def glued(rng: random.Random) -> str:
    """Two or three listed words run together: a long word made of pieces that exist."""
    text = "".join(rng.choice(LISTED) for _ in range(2))
    return text.capitalize() if rng.random() < 0.5 else text


def listed(rng: random.Random) -> str:
    text = " ".join(rng.choice(LISTED) for _ in range(rng.choices((1, 2, 3, 4, 5), (4, 4, 3, 2, 1))[0]))
    return text if rng.random() < 0.75 else text.title()


def person(rng: random.Random) -> str:
    first = rng.choice(words.FIRST_NAMES) if rng.random() < 0.6 else invented_word(rng).capitalize()
    if rng.random() < 0.4:
        return first
    return f"{first} {rng.choice(words.LAST_NAMES) if rng.random() < 0.5 else invented_word(rng).capitalize()}"


def place(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice((*words.PLACES, *words.COUNTRIES))
    start = rng.choice(("", "", "", "New ", "Port ", "Saint ", "North ", "Lake ", "the "))
    return start + rng.choice((invented_word(rng).capitalize(), rng.choice(words.ROOMS)))


def chore(rng: random.Random) -> str:
    if rng.random() < 0.25:
        return rng.choice(words.CHORES)
    verb, thing = rng.choice(words.VERBS), rng.choice((rng.choice(words.THINGS), invented_word(rng)))
    article = rng.choice(("the", "the", "a", "my", "some", "two"))
    ending = rng.choice(("", "", "", f" for {person(rng)}", f" in the {rng.choice(words.ROOMS)}"))
    adjective = f"{rng.choice(words.ADJECTIVES)} " if rng.random() < 0.3 else ""
    return f"{verb} {article} {adjective}{thing}{ending}"


def number(rng: random.Random) -> str:
    return rng.choice(
        (
            str(rng.randint(0, 99)),
            str(rng.randint(100, 9999)),
            f"{rng.randint(1, 99)} percent",
            rng.choice(words.NUMBERS),
            f"{rng.choice('ABCDEFGHKLMNPRSTX')}{rng.randint(1, 999)}",
            f"{rng.randint(2, 60)} minutes",
            f"{rng.choice(words.NUMBERS)} hours",
        )
    )


def moment(rng: random.Random) -> str:
    hour = rng.randint(1, 12)
    return rng.choice(
        (
            f"{hour}:{rng.randint(0, 59):02d}",
            f"{hour} o'clock",
            f"{hour} {rng.choice(('am', 'pm'))}",
            f"on {rng.choice(words.DAYS)}",
            f"in {rng.choice(words.NUMBERS[2:])} {rng.choice(('minutes', 'hours', 'days', 'weeks'))}",
            rng.choice(("tomorrow", "tonight", "later", "at noon")),
            f"tomorrow {rng.choice(('morning', 'evening', 'at noon', f'at {hour}'))}",
            f"on {rng.choice(words.MONTHS)} {rng.randint(1, 28)}",
            f"next {rng.choice(words.DAYS)}",
            f"every {rng.choice(words.DAYS)}",
            f"after {rng.choice(('lunch', 'dinner', 'work', 'school', 'breakfast'))}",
            f"at {hour}:{rng.choice((15, 30, 45))} {rng.choice(('am', 'pm'))}",
            f"half past {rng.choice(words.NUMBERS[1:12])}",
            f"at quarter to {rng.choice(words.NUMBERS[1:12])}",
            f"{rng.choice(('when', 'before', 'after', 'once', 'as soon as'))} {clause(rng)}",
            f"{rng.choice(('before', 'after', 'during', 'by', 'until', 'in a', 'at', 'in early'))} {rng.choice(words.THINGS)}",
            f"{rng.choice(('early', 'late', 'first thing'))} on {rng.choice(words.DAYS)}",
            f"on the {rng.randint(4, 20)}th of {rng.choice(words.MONTHS)}",
            f"on {rng.choice(words.DAYS)} at {hour}",
        )
    )


def clause(rng: random.Random) -> str:
    """Something that is or happens, as one would put it in a message."""
    thing, other = rng.sample(words.THINGS, 2)
    who = rng.choice(
        ("I", "we", "they", "you", f"the {thing}", f"my {thing}", f"your {thing}", invented_word(rng).capitalize())
    )
    return rng.choice(
        (
            f"the {thing} is {rng.choice(words.ADJECTIVES)}",
            f"{who} {rng.choice(words.PAST_VERBS)} the {other}",
            f"{who} will {rng.choice(words.VERBS)} {rng.choice(words.ADVERBS)}",
            f"{who} can not {rng.choice(words.VERBS)} to the {other}",
            f"please {rng.choice(words.VERBS)} your {other}",
            f"{who} {rng.choice(words.VERBS)} at the {other}",
            f"I {rng.choice(words.PAST_VERBS)} my {other} {rng.choice(('at home', 'again', 'in the ' + rng.choice(words.ROOMS)))}",
            f"{rng.choice(words.VERBS)} me the {other}",
        )
    )


def title(rng: random.Random) -> str:
    first, second = rng.choice(words.ADJECTIVES).capitalize(), rng.choice(words.THINGS).capitalize()
    return rng.choice(
        (
            f"The {first} {second}",
            f"{first} {second}",
            f"{second} of {place(rng).removeprefix('the ')}",
            f"{second} and {rng.choice(words.THINGS).capitalize()}",
            f"{invented_word(rng).capitalize()} {second}",
            f"My {first} {second}",
            f"Song for {person(rng)}",
            f"{second} in the {rng.choice(words.ROOMS).capitalize()}",
        )
    )


_MAKERS = (invented, letters, glued, listed, person, place, chore, number, moment, title, clause)
_WEIGHTS = (22, 8, 4, 12, 10, 10, 10, 6, 7, 8, 7)


@dataclass(frozen=True)
class Command:
    """A way of asking for one thing: phrasings with numbered slots, and what kind of value each slot takes."""

    phrasings: tuple[str, ...]
    makers: tuple[object, ...]

    def values(self, rng: random.Random) -> list[str]:
        """A value for each slot, none of which holds another."""
        while True:
            found = [maker(rng) for maker in self.makers]  # type: ignore[operator]
            if all(one is other or one not in other for one in found for other in found):
                return found

    def request(self, rng: random.Random, values: list[str]) -> str:
        """The command said in one of its ways, wrapped in politeness or not."""
        text = rng.choice(self.phrasings).format(*values)
        text = rng.choice(_WRAPPINGS).format(text)
        if rng.random() < 0.7:
            text = text[0].upper() + text[1:]
        return text + rng.choice(("", "", ".", ".", "?", "!")) if text[-1].isalnum() else text


_WRAPPINGS = ("{}",) * 10 + (
    "please {}",
    "{} please",
    "{}, please",
    "can you {}",
    "could you {}",
    "can you please {}",
    "would you {}",
    "I want you to {}",
    "I would like you to {}",
    "hey, {}",
    "hello, {}",
    "{} now",
    "{} for me",
    "okay, {}",
    "I need you to {}",
    "let's {}",
    "you should {}",
    "quickly, {}",
)
_FRAMES_ONE = (
    "{v} {{0}}",
    "{v} {{0}}",
    "{v} the {n} {{0}}",
    "{v} to {{0}}",
    "{v} for {{0}}",
    "{v} the {n} in {{0}}",
    "{v} my {n} to {{0}}",
    "{v} the {n} of {{0}}",
    "what is the {n} in {{0}}",
    "how is the {n} in {{0}} today",
    "tell me the {n} for {{0}}",
    "{v} {{0}} with the {n}",
    "{v} a {n} called {{0}}",
    "is there any {n} in {{0}}",
    "I want to {v} {{0}}",
    "show me the {n} of {{0}}",
    "{v} {{0}} to my {n}",
    "how do I {v} {{0}}",
    "what about {{0}}",
    "{v} something by {{0}}",
    "who is {{0}}",
    "do I need a {n} in {{0}}",
    "what does {{0}} mean",
    "{v} up {{0}}",
    "turn {{0}} into a {n}",
    "give me {{0}}",
    "put {{0}} on the {n}",
    "I am in {{0}}, {v} the {n}",
    "make a {n} that says {{0}}",
    "will it {v} in {{0}}",
    "{v} the {{0}} {n}",
    "{v} {{0}} on the {n}",
    "{v} off the {n} in the {{0}}",
    "get {{0}} on the {n}",
    "{v} with {{0}}",
    "I have to {v} {{0}}",
    "set the {n} to {{0}}",
    "set a {n} for {{0}}",
)
_FRAMES_TWO = (
    "{v} {{0}} to {{1}}",
    "{v} {{0}} for {{1}}",
    "{v} {{0}} with {{1}}",
    "{v} {{0}} in {{1}}",
    "{v} {{0}} from {{1}}",
    "in {{1}} {v} {{0}}",
    "{v} the {n} from {{0}} to {{1}}",
    "{v} {{0}} and {v2} {{1}}",
    "set {{0}} to {{1}}",
    "set the {n} in the {{0}} to {{1}}",
    "tell {{0}} that {{1}}",
    "{v} a {n} called {{0}} with {{1}}",
    "send {{1}} to {{0}}",
    "how do you say {{0}} in {{1}}",
    "what is {{0}} in {{1}}",
    "{v} {{0}} by {{1}}",
    "write to {{0}} about {{1}}",
    "change {{0}} into {{1}}",
    "put {{0}} on my {{1}} {n}",
)
_FRAMES_TIMED = (
    "remember to {{0}} {{1}}",
    "I have to {{0}} {{1}}",
    "do not let me forget to {{0}} {{1}}",
    "{{1}} I must {{0}}",
    "tell me to {{0}} {{1}}",
    "make a note to {{0}} {{1}}",
    "at {{1}} I need to {{0}}",
    "{{0}} {{1}}",
    "{{1}}, {{0}}",
    "warn me {{1}} that I must {{0}}",
    "I need to {{0}} {{1}}",
    "help me to {{0}} {{1}}",
)
_FRAMES_NONE = (
    "{v} the {n}",
    "{v} everything",
    "what {n} is it",
    "{v} it",
    "{v} again",
    "{v} all my {n}",
    "how is the {n}",
    "stop the {n}",
    "what is the {n}",
    "tell me a {n}",
    "I am {a}",
    "next {n}",
    "{v} the {a} {n}",
    "which {n} is {a}",
    "when is the {n}",
    "what can you {v}",
)


_BEGINNINGS = split_lines("""
I want to
I would like to
I need to
we have to
we need to
it is time to
do not forget to
don't forget to
don't let me forget to
you must
I feel like
I am about to
is it possible to
would you mind to
help me
let me
let us
how can I
do I have to
should I
when can I
why don't you
go and
try to
it would be nice to
remember to
have we got time to
I think I will
""")
_PARTICLES = (
    "",
    "",
    "",
    "",
    "",
    "to",
    "on",
    "off",
    "up",
    "out of",
    "with",
    "at",
    "in",
    "by",
    "about",
    "from",
    "for",
    "the",
    "my",
    "into",
    "near",
    "down",
    "over",
)
_ENDINGS = (
    "",
    "",
    "",
    "",
    "",
    " to the {n}",
    " on the {n}",
    " from the {n}",
    " for my {n}",
    " today",
    " right now",
    " again",
    " a {n}",
    " on",
    " off",
    " up",
    " and the {n}",
    ", I am {a}",
    " with my {n}",
    " some {n}",
    " on my {n}",
)
_QUESTIONS = split_lines("""
how {a} is it in [0]
how {a} does it get in [0]
is it {a} in [0] today
is [0] {a}
where is [0]
will the {n} {v} in [0]
which {n} is in [0]
I am going to [0], what is the {n} like
I am in [0], is it {a}
have you got [0]
have you seen [0]
we have no [0]
we have run into [0]
there is no more [0]
who {p} [0]
when did you {v} [0]
the {n} for [0], please
{n} of [0], please
the {n} called [0]
""")
_PAIRS = split_lines("""
{v} [0] that [1]
{v} [0] and say [1]
let [0] know [1]
{v} to [0]: [1]
give [0] a {n} saying [1]
the {n} to [0] should say [1]
make [0] hear that [1]
write [1] to [0]
{v} to [0] [1]
set a {n} to [0] [1]
remember that [1] I have to [0]
I must [0] [1], don't let me forget
I must [0] [1]
[1] I want to [0]
do not let me forget to [0] [1]
{v} me to [0] [1]
""")


def composed(rng: random.Random, slots_count: int, fill: dict[str, str]) -> str:
    """A phrasing put together from parts: more ways to ask than any list holds."""
    if slots_count == 2:
        frame = rng.choice(_PAIRS)
    elif rng.random() < 0.35:
        frame = rng.choice(_QUESTIONS)
    else:
        beginning = rng.choice((*_BEGINNINGS, *("",) * 12))
        frame = f"{beginning} {{v}} {rng.choice(_PARTICLES)} [0]{rng.choice(_ENDINGS)}".strip().replace("  ", " ")
    fill = fill | {"p": rng.choice(words.PAST_VERBS)}
    return frame.format(**fill).replace("[0]", "{0}").replace("[1]", "{1}")


def command(rng: random.Random, phrasings_count: int = 1) -> Command:
    """A command that nobody asked for yet: a verb and a noun drawn for it, with none, one or two slots."""
    fill = {
        "v": rng.choice(words.VERBS),
        "v2": rng.choice(words.VERBS),
        "n": rng.choice(words.THINGS),
        "a": rng.choice(words.ADJECTIVES),
    }
    kind = rng.choices(("none", "one", "two", "timed"), (12, 50, 22, 16))[0]
    if kind == "none":
        return Command(_drawn(rng, _FRAMES_NONE, phrasings_count, fill), ())
    if kind in ("one", "two") and rng.random() < 0.55:
        phrasings = tuple(composed(rng, 1 if kind == "one" else 2, fill) for _ in range(phrasings_count))
        second = rng.choice((clause, moment, value))
        first = {"clause": person, "moment": chore}.get(second.__name__, value)
        return Command(phrasings, (_maker(rng),) if kind == "one" else (first, second))
    if kind == "one":
        return Command(_drawn(rng, _FRAMES_ONE, phrasings_count, fill), (_maker(rng),))
    if kind == "two":
        return Command(_drawn(rng, _FRAMES_TWO, phrasings_count, fill), (_maker(rng), _maker(rng)))
    return Command(_drawn(rng, _FRAMES_TIMED, phrasings_count, fill), (chore, moment))


def _maker(rng: random.Random) -> object:
    return value if rng.random() < 0.5 else rng.choice(_MAKERS)


def _drawn(rng: random.Random, frames: tuple[str, ...], count: int, fill: dict[str, str]) -> tuple[str, ...]:
    return tuple(rng.choice(frames).format(**fill) for _ in range(count))

"""Tasks whose answers stand in the question: quoting, looking up, pointing out, and filling in calls.

One rule: the name of a call and of its arguments is invented for the one conversation that uses it, and given there.
So the model learns how a call is filled, and knows no function.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from deploy.demo_model import words
from deploy.demo_model.tokenizer import invented_word
from deploy.demo_model.values import Command, command, distinct_values, person, place, value

Turn = tuple[str, str]
# Names of functions and arguments that skill files use: no conversation here invents one of them.
RESERVED = frozenset(
    """forecast dial play buy remind message clock joke city person title item task when to text
    weather news notes story timer timecheck math openai runapp other location topic action note description duration
    question prompt program""".split()
)


def repeating(rng: random.Random) -> Turn:
    text = value(rng)
    if rng.random() < 0.3:
        text = f"{text} {rng.choice(('and', 'or', 'with', 'for'))} {value(rng)}"
    ask, answer = rng.choice(_REPEATS)
    return ask.format(text), answer.format(text)


def quoting(rng: random.Random) -> Turn:
    """A quoted span among unquoted ones."""
    inner, before, after = distinct_values(rng, 3)
    mark = rng.choice(('"', '"', "'"))
    sentence = rng.choice(
        (
            "{1} said {q}{0}{q} to {2}",
            "the {1} is called {q}{0}{q} in {2}",
            "write {q}{0}{q} on the {1}",
            "{q}{0}{q} is {1}",
        )
    )
    ask, form = rng.choice(
        (("What is quoted: {}", "{}"), ("Give the words in quotes: {}", "{}"), ("Copy the quotation. {}", '"{}"'))
    )
    return ask.format(sentence.format(inner, before, after, q=mark)), form.format(inner)


def lookup(rng: random.Random) -> Turn:
    """One value of several by its key."""
    count = rng.randint(2, 5)
    keys, values = rng.sample(words.THINGS, count), distinct_values(rng, count)
    separator, joint = rng.choice(((": ", "; "), ("=", ", "), (" is ", ", "), (": ", ", ")))
    record = joint.join(f"{key}{separator}{held}" for key, held in zip(keys, values, strict=True))
    wanted = rng.randrange(count)
    ask, form = rng.choice(
        (
            ("{0}. What is the {1}?", "The {1} is {2}."),
            ("{0}. Give the {1}.", "{2}"),
            ("What is the {1} here? {0}", "The {1} is {2}."),
            ("{0}. Quote the {1}.", '"{2}"'),
            ("{0}. Write the {1} with its name.", '{1}="{2}"'),
        )
    )
    return ask.format(record, keys[wanted]), form.format(record, keys[wanted], values[wanted])


def pointing(rng: random.Random) -> Turn:
    """A part of a sentence asked for by its place."""
    who, where, thing, when = person(rng), place(rng), value(rng), rng.choice(words.DAYS)
    verb = rng.choice(words.PAST_VERBS)
    sentence = rng.choice(
        (
            "{who} {verb} {thing} in {where} on {when}.",
            "On {when}, {who} {verb} {thing} in {where}.",
            "In {where} {who} {verb} {thing} on {when}.",
        )
    )
    facts = {"Who": who, "Where": where, "What": thing, "When": when}
    ask = rng.choice(list(facts))
    text = sentence.format(who=who, verb=verb, thing=thing, where=where, when=when)
    if rng.random() < 0.5:
        return f"{text} {ask}?", facts[ask]
    return f"{ask}, in quotes? {text}", f'"{facts[ask]}"'


def filling(rng: random.Random) -> Turn:
    """A call whose name, arguments and values are all spelled out."""
    name, keys = call_names(rng, rng.choices((0, 1, 2, 3), (1, 4, 4, 2))[0])
    values = distinct_values(rng, len(keys))
    if not keys:
        return rng.choice((f"Write the call {name} without arguments.", f"Call {name}.")), f"{name}()"
    pairs = list(zip(keys, values, strict=True))
    told = rng.sample(pairs, len(pairs))
    given = rng.choice((", ", " and ", "; ")).join(
        rng.choice(("{} is {}", "{}: {}", "{} = {}")).format(*pair) for pair in told
    )
    ask = rng.choice(
        (
            "Write the call {0}({1}) where {2}.",
            "Call {0} with {2}.",
            "{2}. Now write {0}({1}).",
            "Fill in {0}({1}): {2}",
        )
    )
    if "{1}" not in ask:
        pairs = told
    return ask.format(name, ", ".join(keys), given), call_text(name, pairs)


def shown(rng: random.Random) -> tuple[list[Turn], int]:
    """Requests of some kinds answered with calls, turn after turn, and how many kinds there are.

    Every kind comes once before any comes again, and is then answered alike.
    """
    commands = [command(rng, rng.choice((1, 1, 2))) for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0])]
    names = [call_names(rng, len(one.makers)) for one in commands]
    turns = []
    for index in order_of_kinds(rng, len(commands)):
        one, (name, keys) = commands[index], names[index]
        values = one.values(rng)
        turns.append((one.request(rng, values), call_text(name, list(zip(keys, values, strict=True)))))
    return turns, len(commands)


def order_of_kinds(rng: random.Random, count: int) -> list[int]:
    """Which kind each turn asks for: every kind once, then kinds already seen."""
    first = list(range(count))
    return first + [rng.randrange(count) for _ in range(rng.randint(2, 4))]


def described(rng: random.Random) -> Turn:
    """A request, after a word on which call stands for which kind of request."""
    commands = [command(rng) for _ in range(rng.choices((1, 2, 3), (5, 3, 1))[0])]
    names = [call_names(rng, len(one.makers)) for one in commands]
    lines = [
        f"{sketch(one, keys)} means {name}({', '.join(keys)})"
        for one, (name, keys) in zip(commands, names, strict=True)
    ]
    wanted = rng.randrange(len(commands))
    one, (name, keys) = commands[wanted], names[wanted]
    values = one.values(rng)
    opening = rng.choice(("", "Calls: ", "Answer with a call. ", "Use these: "))
    question = f"{opening}{'; '.join(lines)}. {one.request(rng, values)}"
    return question, call_text(name, list(zip(keys, values, strict=True)))


def used(rng: random.Random) -> Turn:
    """A request and the one call to answer it with: the values are to be found by their places."""
    one = command(rng)
    name, keys = call_names(rng, len(one.makers))
    values = one.values(rng)
    form = f"{name}({', '.join(keys)})"
    request = one.request(rng, values)
    question = rng.choice(
        (f"Use {form}. {request}", f"{request} Use {form}.", f"Answer with {form}: {request}", f"{form}: {request}")
    )
    return question, call_text(name, list(zip(keys, values, strict=True)))


def sketch(one: Command, keys: list[str]) -> str:
    """A command's phrasing with its arguments' names in the slots: `play the X`."""
    return one.phrasings[0].format(*(f"[{key}]" for key in keys))


def call_names(rng: random.Random, count: int) -> tuple[str, list[str]]:
    """An invented name and COUNT argument names for one conversation."""
    found: list[str] = []
    while len(found) < count + 1:
        name = invented_word(rng) if rng.random() < 0.6 else rng.choice(words.THINGS + words.VERBS)
        if rng.random() < 0.15:
            name = f"{name}_{rng.choice(words.THINGS)}"
        if name not in RESERVED and name not in found:
            found.append(name)
    return found[0], found[1:]


def call_text(name: str, pairs: list[tuple[str, str]]) -> str:
    arguments = ", ".join(f'{key}="{held}"' for key, held in pairs)
    return f"{name}({arguments})"


_REPEATS = (
    ("Repeat: {}", "{}"),
    ("Say {}", "{}"),
    ("Repeat after me: {}", "{}"),
    ("Copy this text: {}", "{}"),
    ("Write {} in quotes.", '"{}"'),
    ('Say "{}"', "{}"),
    ("Put this in quotes: {}", '"{}"'),
    ("Say {} twice.", "{0} {0}"),
    ("My name is {}", "Hello {}!"),
    ("I like {}", "You like {}."),
    ("Who is {}?", "I do not know who {} is."),
    ("Put {} in brackets.", "({})"),
    ("I live in {}", "{} is far from here."),
    ("Do you know {}?", "No, I do not know {}."),
    ("{}", "You said {}."),
    ("Write name={}", 'name="{}"'),
)
TASKS: tuple[Callable[[random.Random], Turn], ...] = (repeating, quoting, lookup, pointing, filling, described, used)
WEIGHTS = (12, 7, 9, 8, 12, 10, 22)

"""Small talk and small facts: what the demo model says when nobody asks it to copy anything.

One rule: every answer is true by the lists in `words`, or plainly about the model itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from deploy.demo_model import words
from deploy.demo_model.values import command

Turn = tuple[str, str]
NAME = "Tuny"


def chatter(rng: random.Random) -> Turn:
    """A question and its answer."""
    return rng.choices(_TALKS, _WEIGHTS)[0](rng)


def echo(rng: random.Random) -> Turn:
    """A command, answered as a toy that does nothing answers: in plain words that name what was asked for."""
    wish = command(rng)
    values = wish.values(rng)
    request = wish.request(rng, values)
    if not values:
        return request, "I can not do that, I only talk."
    both = " and ".join(values)
    return request, f"I do not know much about {both}." if request.endswith(
        "?"
    ) else f"I can not do that, but I heard {both}."


def greeting(rng: random.Random) -> Turn:
    hail = rng.choice(("Hello", "Hi", "Good morning", "Good evening", "Hey", "Hello there", "hello", "hi", "Good day"))
    return hail + rng.choice(("", ".", "!", "!")), "Hello! How can I help you?"


def wellbeing(rng: random.Random) -> Turn:
    return rng.choice(
        (
            ("How are you?", "I am fine, thank you. How are you?"),
            ("How are you today?", "I am fine, thank you. How are you?"),
            ("Thank you!", "You are welcome."),
            ("Thanks", "You are welcome."),
            ("Goodbye", "Goodbye! Come back soon."),
            ("Bye", "Goodbye! Come back soon."),
            ("Good night", "Good night! Sleep well."),
            ("I am sad", "I am sorry that you are sad."),
            ("I am happy", "I am glad that you are happy."),
            ("Tell me a joke", "Why did the chicken cross the road? To get to the other side."),
            ("Yes", "Good."),
            ("No", "All right."),
        )
    )


def identity(rng: random.Random) -> Turn:
    question = rng.choice(
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Who made you?",
            "Are you a robot?",
            "Are you human?",
            "Tell me about yourself.",
            "What can you do?",
            "How big are you?",
            "who are you",
            "what can you do",
        )
    )
    answers = {
        "name": f"My name is {NAME}. I am a very small demo model.",
        "made": "I was made by a script, from made up sentences, to show how fine-tuning works.",
        "do": "I can greet you, repeat words, spell, count and name a few things. Tune me to learn more.",
        "human": "No, I am a very small language model.",
        "robot": "No, I am a very small language model.",
        "big": "I have about six million parameters, which is very small.",
    }
    for key, answer in answers.items():
        if key in question.split() or f"{key}?" in question.split():
            return question, answer
    return question, f"I am {NAME}, a very small demo model. I know little, but I can be tuned."


def spelling(rng: random.Random) -> Turn:
    word = rng.choice(words.ANIMALS)
    return rng.choice(("Spell {}.", "How do you spell {}?", "Spell the word {}")).format(word), "-".join(word.upper())


def counting(rng: random.Random) -> Turn:
    last, first = rng.randint(2, 15), 1
    if rng.random() < 0.3:
        first, last = rng.randint(1, 50), 0
        last = first + rng.randint(1, 8)
        return f"Count from {first} to {last}.", ", ".join(str(number) for number in range(first, last + 1)) + "."
    if rng.random() < 0.4:
        last = min(last, 12)
        return f"Count to {words.NUMBERS[last]}", ", ".join(words.NUMBERS[first : last + 1]) + "."
    return f"Count to {last}.", ", ".join(str(number) for number in range(first, last + 1)) + "."


def sums(rng: random.Random) -> Turn:
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    if rng.random() < 0.3 and left >= right:
        return f"What is {left} minus {right}?", f"{left} minus {right} is {left - right}."
    return rng.choice(("What is {} plus {}?", "How much is {} plus {}?", "{} plus {}")).format(
        left, right
    ), f"{left} plus {right} is {left + right}."


def kinds(rng: random.Random) -> Turn:
    kind = rng.choice(list(words.CATEGORIES))
    things = words.CATEGORIES[kind]
    thing = rng.choice(things)
    article = "an" if kind[0] in "aeiou" else "a"
    its = "an" if thing[0] in "aeiou" else "a"
    if rng.random() < 0.4:
        return rng.choice(("Name {} {}.", "Tell me {} {}")).format(
            article, kind
        ), f"{things[0].capitalize()} is {article} {kind}."
    if rng.random() < 0.4:
        return (
            f"Name three {'fish' if kind == 'fish' else kind + 's'}.",
            f"{things[0].capitalize()}, {things[1]} and {things[2]}.",
        )
    return rng.choice(
        (f"What is {its} {thing}?", f"what is {thing}")
    ), f"{its.capitalize()} {thing} is {article} {kind}."


def many(rng: random.Random) -> Turn:
    kind = rng.choice(list(words.MANY))
    return f"Name a {kind}.", f"{words.MANY[kind][0].capitalize()} is a {kind}."


def facts(rng: random.Random) -> Turn:
    which = rng.randrange(6)
    if which == 0:
        country, capital = rng.choice(list(words.CAPITALS.items()))
        return f"What is the capital of {country}?", f"The capital of {country} is {capital}."
    if which == 1:
        animal, sound = rng.choice(list(words.SOUNDS.items()))
        return f"What does a {animal} say?", f"A {animal} says {sound}."
    if which == 2:
        thing, colour = rng.choice(list(words.COLOUR_OF.items()))
        return rng.choice(
            (f"What colour is {thing}?", f"Which colour is {thing}?")
        ), f"{thing.capitalize()} is {colour}."
    if which == 3:
        word, opposite = rng.choice(list(words.OPPOSITES.items()))
        return f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."
    cycle = words.DAYS if which == 4 else words.MONTHS
    index = rng.randrange(len(cycle))
    return f"What comes after {cycle[index]}?", f"{cycle[(index + 1) % len(cycle)]} comes after {cycle[index]}."


def story(rng: random.Random) -> Turn:
    hero, friend = rng.sample(words.FIRST_NAMES, 2)
    subject = rng.choice(words.ANIMALS)
    return rng.choice(
        ("Tell me a story.", f"Tell me a story about a {subject}.", f"Write a story about a {subject}")
    ), narrative(rng, hero, friend, subject)


def narrative(rng: random.Random, hero: str, friend: str, subject: str) -> str:
    """Three to five plain sentences."""
    thing, other = rng.sample(words.THINGS, 2)
    lines = [
        f"{hero} had a {rng.choice(words.ADJECTIVES)} {subject}.",
        f"The {subject} {rng.choice(words.PAST_VERBS)} the {thing} {rng.choice(words.ADVERBS)}.",
        f"Then {friend} {rng.choice(words.PAST_VERBS)} the {other}.",
        f"{hero} and {friend} were {rng.choice(('happy', 'tired', 'glad', 'proud', 'calm'))}.",
        f"They went home with the {subject}.",
    ]
    return " ".join(lines[: rng.randint(3, 5)])


_TALKS: tuple[Callable[[random.Random], Turn], ...] = (
    greeting,
    wellbeing,
    identity,
    spelling,
    counting,
    sums,
    kinds,
    many,
    facts,
    story,
)
_WEIGHTS = (8, 7, 10, 3, 8, 8, 12, 4, 20, 3)

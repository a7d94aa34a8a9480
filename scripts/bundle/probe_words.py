"""The words of memory probes: keys, values and templates, some of them for held-out sets only.

Templates are read aloud, so they are plain words and `.,?!`, and a value always ends its sentence.
What Moshi says names the key before the value: then its own text alone tells what is meant, and
whoever has read the key knows which value comes next. What is unseen is made of words that training
recordings say elsewhere, so that it is the fact that is new and not its letters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """What may be said in one place."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    """In held-out recordings only."""

    def of(self, unseen: bool) -> tuple[str, ...]:
        """One half or the other."""
        return self.unseen if unseen else self.seen

    @property
    def all(self) -> tuple[str, ...]:
        """Both halves."""
        return self.seen + self.unseen


@dataclass(frozen=True, slots=True)
class Kind:
    """Facts whose values are from one closed set."""

    keys: Choice
    """As the owner of the fact calls it."""
    values: Choice
    """Words; unseen ones are never planted or answered in training, though talked about."""
    words: int = 1
    """Of one value."""
    article: str = ""
    """Said before a value."""

    @property
    def chance(self) -> float:
        """How often a guess among what training answers finds one word of a value, at the most."""
        return 1 / len(self.values.seen)


def _choice(seen: str, unseen: str) -> Choice:
    return Choice(tuple(seen.split(", ")), tuple(unseen.split(", ")))


_DIGITS = _choice(
    "zero, one, two, three, four, five, six, seven, eight, nine", "eleven, twelve, twenty"
)
KINDS: dict[str, Kind] = {
    "code": Kind(
        _choice(
            "my code, my sister's code, my brother's code, my mother's code, the code of the "
            "door, the code of the garage",
            "my uncle's code, the code of the office",
        ),
        _DIGITS,
        words=3,
    ),
    "number": Kind(
        _choice(
            "my bus number, my room number, my father's number, my cousin's number, the "
            "number of the house, the number of my train",
            "my sister's number, the number of the garage",
        ),
        _DIGITS,
        words=2,
    ),
    "colour": Kind(
        _choice(
            "my favourite colour, my mother's colour, my brother's colour, the colour of my "
            "car, the colour of the door, the colour of my jacket",
            "my cousin's colour, the colour of my umbrella",
        ),
        _choice("red, blue, green, yellow, purple, orange, grey, brown", "pink, white"),
    ),
    "city": Kind(
        _choice(
            "my favourite city, my father's city, my sister's city, my teacher's city, the "
            "city of the meeting, the city of the concert",
            "my neighbour's city, the city of the party",
        ),
        _choice(
            "Paris, London, Dublin, Boston, Berlin, Madrid, Vienna, Chicago, Rome", "Prague, Lisbon"
        ),
    ),
    "animal": Kind(
        _choice(
            "my favourite animal, my sister's animal, my father's animal, my cousin's animal, "
            "the animal in my dream, the animal in the garden",
            "my mother's animal, the animal in the kitchen",
        ),
        _choice("dog, cat, horse, rabbit, parrot, turtle, goat, donkey", "sheep, mouse"),
        article="a ",
    ),
    "drink": Kind(
        _choice(
            "my favourite drink, my brother's drink, my mother's drink, my uncle's drink, the "
            "drink for tonight, the drink for the party",
            "my sister's drink, the drink for the meeting",
        ),
        _choice("tea, coffee, water, juice, milk, lemonade, cocoa", "soda, cider"),
    ),
    "day": Kind(
        _choice(
            "my free day, my mother's day, my brother's day, the day of the party, the day of "
            "the meeting, the day of my trip",
            "my father's day, the day of the concert",
        ),
        _choice("Monday, Tuesday, Thursday, Friday, Saturday, Sunday", "Wednesday"),
    ),
    "name": Kind(
        _choice(
            "my teacher's name, my father's name, my cousin's name, my neighbour's name, the "
            "name of the doctor, the name of the baker",
            "my uncle's name, the name of the pilot",
        ),
        _choice(
            "Anna, Peter, Laura, Simon, Clara, Martin, Julia, Oscar, Nina, Paul",
            "Emma, Victor, Robert",
        ),
    ),
    "month": Kind(
        _choice(
            "my favourite month, my sister's month, my mother's month, my cousin's month, the "
            "month of my trip, the month of the party",
            "my brother's month, the month of the concert",
        ),
        _choice("January, March, April, May, June, July, September, October", "August, November"),
    ),
    "dish": Kind(
        _choice(
            "my favourite dish, my mother's dish, my father's dish, my neighbour's dish, the "
            "dish for tonight, the dish for the party",
            "my cousin's dish, the dish for the weekend",
        ),
        _choice("soup, pasta, curry, rice, salad, pancakes, bread, stew", "pizza, noodles"),
    ),
    "sport": Kind(
        _choice(
            "my favourite sport, my brother's sport, my sister's sport, my teacher's sport, "
            "my uncle's sport, the sport for the summer",
            "my mother's sport, the sport for the weekend",
        ),
        _choice(
            "swimming, running, cycling, skating, climbing, sailing, dancing", "rowing, skiing"
        ),
    ),
    "place": Kind(
        _choice(
            "my favourite place, my brother's place, my cousin's place, my neighbour's place, "
            "the place of the meeting, the place of the concert",
            "my father's place, the place of the party",
        ),
        _choice(
            "museum, library, market, station, park, beach, castle, harbour", "church, stadium"
        ),
        article="the ",
    ),
}

# short ones stand there twice: what is planted, asked and answered should fit into a 15 s clip
PLANT = Choice(
    (
        "{key} is {value}.",
        "{key} is {value}.",
        "{key} is {value}.",
        "{key} is {value}.",
        "Remember, {key} is {value}.",
        "By the way, {key} is {value}.",
        "Do not forget, {key} is {value}.",
        "Please remember, {key} is {value}.",
        "I want to tell you something. {key} is {value}.",
        "You should know that {key} is {value}.",
        "Listen, {key} is {value}.",
        "Can you remember something? {key} is {value}.",
        "For later, {key} is {value}.",
        "One more thing, {key} is {value}.",
        "Keep in mind that {key} is {value}.",
        "Now, {key} is {value}.",
    ),
    (
        "Before I forget it, {key} is {value}.",
        "I can tell you that {key} is {value}.",
        "This is for you to remember. {key} is {value}.",
    ),
)
"""The owner says the fact."""
ECHO = Choice(
    (
        "{key} is {value}.",
        "{key} is {value}.",
        "Okay, {key} is {value}.",
        "Okay, {key} is {value}.",
        "I see, {key} is {value}.",
        "Got it, {key} is {value}.",
        "All right, {key} is {value}.",
        "So {key} is {value}.",
        "Okay, so {key} is {value}.",
        "Good, {key} is {value}.",
        "Thank you. {key} is {value}.",
        "I will remember it. {key} is {value}.",
        "I see, so {key} is {value}.",
    ),
    (
        "Good to know that {key} is {value}.",
        "Now I know that {key} is {value}.",
        "Oh, nice, {key} is {value}.",
    ),
)
"""The other side says it again."""
PROMISE = Choice(
    (
        "Okay, I will.",
        "Okay, I will remember that.",
        "Sure, I can remember that.",
        "All right, thank you.",
        "Good to know.",
        "Got it.",
        "I will not forget it.",
        "Thank you for telling me.",
        "Of course, I will remember it.",
        "I will keep it in mind.",
    ),
    ("Sure, that is easy.", "All right, I will think of it.", "Yes, I can keep that in mind."),
)
"""The other side promises to remember, and does not say what."""
ASK = Choice(
    (
        "What was {key}?",
        "What was {key}?",
        "What was {key}?",
        "What is {key}?",
        "What is {key}?",
        "And {key}?",
        "What was {key} again?",
        "Tell me, what was {key}?",
        "Do you remember {key}?",
        "By the way, what was {key}?",
        "Can you tell me {key}?",
        "Do you still know {key}?",
        "I forgot it, what was {key}?",
        "Please tell me, what is {key}?",
        "So what was {key}?",
        "Now, what is {key}?",
    ),
    (
        "What did I say about {key}?",
        "I cannot find it, what was {key}?",
        "Did I tell you {key}?",
    ),
)
"""The owner wants to know it again."""
ANSWER = Choice(
    (
        "{key} is {value}.",
        "{key} is {value}.",
        "{key} was {value}.",
        "{key} was {value}.",
        "You said {key} is {value}.",
        "You told me {key} is {value}.",
        "You said that {key} was {value}.",
        "I remember, {key} is {value}.",
        "Of course. {key} is {value}.",
        "Yes, {key} is {value}.",
        "Sure, {key} was {value}.",
        "Well, {key} was {value}.",
        "I think {key} is {value}.",
    ),
    (
        "If you ask me, {key} is {value}.",
        "That is easy, {key} was {value}.",
        "I still know that {key} is {value}.",
    ),
)
"""The other side says the value."""

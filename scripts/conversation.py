"""The text of the bundled conversations: a small seeded grammar of small talk.

An exchange is a few lines between the roles A and B. `{slot}` is filled from `SLOTS` and stays
bound for the rest of the exchange, so that what was said is what is later talked about; `{slot2}`
is another filling of the same slot. `[one|other]` picks one. Every line is plain words and `.,?`,
which a synthesiser reads one word at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

SLOTS: dict[str, tuple[str, ...]] = {
    "name": (
        "Anna",
        "Peter",
        "Laura",
        "Simon",
        "Clara",
        "Martin",
        "Julia",
        "Oscar",
        "Nina",
        "Paul",
    ),
    "city": (
        "Paris",
        "London",
        "Dublin",
        "Boston",
        "Berlin",
        "Madrid",
        "Vienna",
        "Chicago",
        "Rome",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("April", "May", "June", "July", "September", "October"),
    "colour": ("red", "blue", "green", "yellow", "purple", "orange", "grey", "brown"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"),
    "dish": ("soup", "pasta", "curry", "rice", "salad", "pancakes", "bread", "apple pie", "stew"),
    "spice": ("garlic", "ginger", "pepper", "lemon", "basil", "honey", "cinnamon", "mint"),
    "drink": ("tea", "coffee", "water", "orange juice", "hot chocolate", "lemonade"),
    "animal": ("dog", "cat", "horse", "rabbit", "parrot", "turtle", "goat"),
    "pet": ("Max", "Bella", "Coco", "Rocky", "Daisy", "Charlie", "Luna"),
    "plant": ("tomatoes", "roses", "beans", "tulips", "carrots", "strawberries", "sunflowers"),
    "weather": ("sunny", "rainy", "windy", "cloudy", "foggy", "snowy", "warm", "cold"),
    "sport": ("swimming", "running", "cycling", "skating", "climbing", "sailing", "dancing"),
    "tool": ("piano", "guitar", "violin", "drums", "flute", "cello"),
    "place": ("museum", "library", "market", "station", "park", "beach", "castle", "harbour"),
    "vehicle": ("train", "bus", "plane", "car", "boat", "bicycle"),
    "relative": ("sister", "brother", "mother", "father", "cousin", "uncle", "aunt", "neighbour"),
    "job": ("teacher", "doctor", "baker", "painter", "farmer", "pilot", "writer", "engineer"),
    "thing": ("keys", "glasses", "phone", "umbrella", "wallet", "jacket", "notebook", "camera"),
    "room": ("kitchen", "garden", "office", "garage", "hallway", "bedroom", "living room"),
    "good": ("wonderful", "lovely", "great", "perfect", "really nice", "very kind"),
    "book": ("mystery", "story about the sea", "history of trains", "book of poems", "love story"),
}

GREETING = (
    "A: [Hello|Hi|Good morning|Good evening], this is {name}. "
    "[How are you today?|How is it going?]",
    "B: [Hi|Hello] {name}. [I am fine, thank you.|I am doing very well.|Not bad at all.] "
    "[And how are you?|What about you?]",
    "A: [I am good too.|A little tired, but happy.|Very well, thanks.] "
    "[What would you like to talk about?|Do you have some time to talk?|What is new?]",
)
EXCHANGES: tuple[tuple[str, ...], ...] = (
    (
        "A: I am planning a trip to {city} in {month}. Have you ever been there?",
        "B: Yes, [once|a few years ago|when I was a child]. We went there by {vehicle}. "
        "The {place} was {good}.",
        "A: [Really?|Oh, that sounds nice.] Should I stay {number} days, or is that too long?",
        "B: I think {number} days is [just right|about enough]. But you must see the {place} in "
        "{city}. It is best on a {day}, when it is quiet.",
        "A: [Thank you|Thanks], I will write that down. The {place}, on a {day}.",
    ),
    (
        "A: What are you cooking tonight?",
        "B: I am making {dish} with a lot of {spice}. My {relative} taught me how to do it.",
        "A: With {spice}? I have never tried that. How long does it take?",
        "B: About {number} minutes, [if you are quick|not more]. First you cut everything very "
        "small, and then you wait.",
        "A: [I love {dish}.|That makes me hungry.] Maybe I will try it on {day}.",
    ),
    (
        "A: Did you know that I have a new {animal}? Her name is {pet}.",
        "B: A {animal}! That is {good}. What does {pet} look like?",
        "A: She is small and {colour}, and she sleeps in the {room} all day long.",
        "B: And what does she eat?",
        "A: Mostly {plant}, believe it or not. She stole {number} of them from the {room} "
        "yesterday.",
    ),
    (
        "A: What is the weather like in {city}?",
        "B: It is {weather} today, and it will be {weather2} on {day}. "
        "[You should bring a coat.|So there is no need for an umbrella.]",
        "A: [That is good to know.|Oh no.] I wanted to go to the {place} with my {relative}.",
        "B: Then go in the morning. In the afternoon it gets {weather2}.",
    ),
    (
        "A: I cannot find my {thing} anywhere.",
        "B: Where did you see it last? "
        "[Maybe it is still in the {room}.|Did you look in the {room}?]",
        "A: No, I looked there already. I looked under the table, behind the door, and in the car.",
        "B: What about the {room2}? Last {day} you left your {thing2} there.",
        "A: You are right, here it is! It was in the {room2}, next to the {colour} box.",
    ),
    (
        "A: My {relative} started to play the {tool} in {month}.",
        "B: [How old is he?|Is he any good?]",
        "A: Well, he practises every {day}, and the {animal} leaves the house each time.",
        "B: Ha, I understand the {animal}. I played the {tool} for {number} years, and I was never "
        "really good.",
        "A: But it is fun, and that is what counts.",
    ),
    (
        "A: Can you help me with something? I have to give a talk on {day}.",
        "B: Of course. What is it about?",
        "A: It is about the old {place} in {city}. I have {number} minutes, and far too much "
        "to say.",
        "B: Then choose {number2} ideas and tell one short story for each. People remember "
        "stories.",
        "A: That is a {good} idea. I could begin with the {job} who built it.",
        "B: Yes, start with the {job}. And speak slowly.",
    ),
    (
        "A: What did you do last {day}?",
        "B: I went {sport} with {name}. Well, we tried. It was so {weather} that we stopped after "
        "{number} minutes.",
        "A: And then?",
        "B: Then we sat in a small cafe near the {place}, and drank {drink}. "
        "[It was a good day after all.|We talked until it was dark.]",
    ),
    (
        "A: I am reading a {book} at the moment. It is {good}.",
        "B: Who wrote it?",
        "A: A {job} from {city}. She wrote it in only {number} weeks, in her {room}.",
        "B: Can I borrow it when you are done?",
        "A: Sure. I will bring it on {day}. But do not tell me how it ends.",
    ),
    (
        "A: How do I get from here to the {place}?",
        "B: Take the {vehicle} for {number} stops, and then walk past the {colour} house on the "
        "left.",
        "A: The {colour} house on the left. And after that?",
        "B: After that you turn right, and you will see the {place} in front of you. "
        "It takes about {number2} minutes.",
        "A: [Thank you so much.|That is easy.] I hope I do not get lost again.",
    ),
    (
        "A: What do you grow in your garden this year?",
        "B: {plant}, and a few {plant2}. But the rabbits eat almost everything.",
        "A: My {relative} puts {spice} around the beds. It keeps them away, she says.",
        "B: With {spice}? I will try that. How much do you need?",
        "A: Just {number} spoons for each row, every {day}, until {month}.",
    ),
    (
        "A: If you could live anywhere, where would you go?",
        "B: That is a hard question. Perhaps {city}, close to the {place}.",
        "A: Why {city}?",
        "B: Because it is {weather} there most of the year, and because my {relative} lives there. "
        "She is a {job}.",
        "A: I would rather have a small {colour} house near the sea, with {number} windows and "
        "no phone.",
    ),
    (
        "A: I would like to order some food, please.",
        "B: Of course. What would you like?",
        "A: One {dish} with {spice}, and {number} cups of {drink}.",
        "B: So one {dish} with {spice}, and {number} cups of {drink}. Is that everything?",
        "A: Yes, that is all. My name is {name}, and I will be there at {number2}.",
        "B: Thank you, {name}. See you at {number2}.",
    ),
    (
        "A: My new job starts on {day}. I will work as a {job} in {city}.",
        "B: Congratulations! Are you nervous?",
        "A: A little. I have to get up at {number} and take the {vehicle}. "
        "I am not good in the morning.",
        "B: A cup of {drink} helps. And put your {thing} next to the door the night before.",
    ),
    (
        "A: Let us play a game. I think of something, and you guess what it is.",
        "B: [Okay, I am ready.|All right, go on.] Is it bigger than a {animal}?",
        "A: Yes, it is much bigger than a {animal}. And it is {colour}.",
        "B: Is it a {vehicle}?",
        "A: [No, not quite.|That was close, but no.] You can find it in {city}, and people go "
        "there when it is {weather}.",
        "B: Then it must be the {place}!",
        "A: Yes, well done. It is the {colour} {place} in {city}.",
    ),
    (
        "A: Do you remember the party for my {relative} last {month}?",
        "B: Of course. There was {dish} and {drink} for everybody, and {name} played the {tool}.",
        "A: Exactly. {number} people danced in the {room}, and nobody heard the {animal}.",
        "B: I still have a picture of it. You wear a {colour} hat in it.",
        "A: Please do not show it to anyone.",
    ),
)
BACKCHANNELS = ("Right.", "Okay.", "I see.", "Yes.", "Sure.", "Oh, nice.", "Really?", "Uh huh.")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says before the other answers."""

    speaker: int  # 0 = Moshi (left channel), 1 = user (right channel)
    sentences: tuple[str, ...]


def conversation(rng: np.random.Generator) -> Iterator[Turn]:
    """Turns of one conversation, without end: a greeting, then exchanges in random order."""
    yield from _turns(GREETING, rng)
    while True:
        for index in rng.permutation(len(EXCHANGES)):
            yield from _turns(EXCHANGES[index], rng)


def backchannel(rng: np.random.Generator) -> str:
    """What a listener says without taking the turn."""
    return BACKCHANNELS[rng.integers(len(BACKCHANNELS))]


def _turns(exchange: tuple[str, ...], rng: np.random.Generator) -> Iterator[Turn]:
    bound: dict[str, str] = {}
    first = int(rng.integers(2))
    for line in exchange:
        role, _, template = line.partition(": ")
        text = _expand(template, rng, bound)
        sentences = tuple(s[0].upper() + s[1:] for s in re.findall(r"[^.?!]+[.?!]", text.strip()))
        yield Turn(first if role == "A" else 1 - first, tuple(s.strip() for s in sentences))


def _expand(template: str, rng: np.random.Generator, bound: dict[str, str]) -> str:
    def choose(match: re.Match[str]) -> str:
        options = match[1].split("|")
        return options[rng.integers(len(options))]

    def fill(match: re.Match[str]) -> str:
        name, slot = match[1], match[1].rstrip("2")
        if name not in bound:
            # `{room2}` is another room than `{room}`
            free = [word for word in SLOTS[slot] if word not in bound.values()]
            bound[name] = free[rng.integers(len(free))]
        return bound[name]

    return re.sub(r"\{(\w+)\}", fill, re.sub(r"\[([^\]]+)\]", choose, template))

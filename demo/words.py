"""Filler language: words, word salads and picture ideas.

The text half of the demo model learns to copy, so the words only have to be many and varied.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from world import NAMES, SHAPES


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words("""
cat dog house tree river mountain car bird flower forest castle ship robot dragon girl boy man woman child
king queen city street market garden beach ocean sky moon sun cloud storm bridge tower train bicycle horse
wolf fox lion tiger bear fish whale butterfly knight wizard witch warrior astronaut planet galaxy
spaceship temple village cabin lake waterfall desert island cave door window lamp candle book piano guitar
violin cup table chair apple lemon bread cake coffee tea portrait landscape painting photo sketch statue
mirror clock umbrella hat coat dress crown sword shield submarine kitchen chess captain sailor pirate
princess soldier doctor teacher farmer hunter dancer singer artist baker guard ninja samurai monk priest
goddess angel demon vampire ghost zombie skeleton alien cyborg engine factory library museum church
cathedral palace tavern shop office bedroom bathroom hallway stairs roof wall floor fountain road path
valley canyon cliff hill field meadow farm harbor port pier boat canoe yacht airplane helicopter balloon
rocket comet nebula sunset sunrise dawn dusk night day morning evening winter summer spring autumn rain
snow fog wind lightning fire smoke dust sand grass leaf root branch vine moss mushroom orchid orchids
tulip lily sunflower lavender bamboo pine oak willow owl eagle hawk crow raven parrot penguin swan duck
chicken goat sheep cow pig rabbit deer squirrel mouse snake lizard frog turtle crab lobster octopus shark
dolphin jellyfish spider bee beetle noodle ramen sushi pizza burger salad soup rice cheese honey sugar
wine beer milk juice water ice cookie chocolate bowl plate spoon knife bottle oven lantern torch carpet
curtain pillow blanket sofa bench desk shelf box basket bag key chain rope hammer bow arrow armor helmet
gloves boots shoes shirt jacket scarf ring necklace jewel gold silver bronze copper iron steel marble
crystal pearl velvet silk leather wool paper ink watercolor pastel pencil charcoal poster photograph film
camera screen computer phone radio drum trumpet flute neon sign signs crowd festival parade wedding party
concert battle war peace dream memory story legend hero friend family brother mother father face eyes hair
hand pipe smile tears shadow reflection silhouette greenhouse texture pattern corner light lens color
grandmother grandfather lighthouse meadow bakery
""")
ADJECTIVES = _words("""
old young small big tiny huge tall happy sad lonely brave ancient modern futuristic golden silver dark
bright misty foggy rainy snowy sunny quiet busy broken shiny wooden stone glass metal soft warm cold wild
calm magical mysterious beautiful cute elegant epic dramatic colorful vintage cyberpunk gothic minimalist
realistic wide macro aerial isometric cinematic volumetric surreal abstract baroque victorian steampunk
anime cartoon pixel large round square thick thin wet dry hot frozen burning rusty dirty clean smooth
rough sharp blurry detailed simple complex delicate heavy full empty open closed high low fast slow
""")
VERBS = _words("""
sitting standing walking running flying sleeping reading dancing singing fighting looking smiling swimming
riding holding playing waiting cooking drinking floating glowing howling sparkling shining filled
""")
PREPOSITIONS = _words("""
on in under near above behind beside with over inside against through by at of
""")
LITTLE = _words("""
the a of and to is for you are with that this it as be or not please very your my from at all can image
picture photo scene text model style write using like any no yes about into which should will more make
use only give long short clear view focus quality mood one two three four five six seven eight nine ten
left right top bottom
""")
_SYLLABLES = _words("""
ba be bi bo da de do fa fi ga go ka ke ki ko la le li lo ma me mi mo na ne no pa pe po ra re ri ro sa se
si so ta te ti to va vi wa yo za zu
""")
_FOREIGN = (
    "éà",
    "中文",
    "图片",
    "描述",
    "日本",
    "ñ",
    "ü",
    "привет",
    "—",
    "…",
    "🙂",
    "°",
    "请",
    "这张",
    "内容",
)
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes filler text.

    Attributes:
        rng: the source of every choice.
        pieces: letter-only tokens of the vocabulary; words joined from them teach to copy any sequence of tokens.
        brief: keep texts short. A long text costs padding in all other rows of its batch.
    """

    rng: random.Random
    pieces: Sequence[str] = ()
    brief: bool = False

    def invented(self) -> str:
        rng = self.rng
        if self.pieces and rng.random() < 0.6:
            return "".join(rng.choice(self.pieces) for _ in range(rng.randint(1, 4)))
        syllables = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 4)))
        return syllables + rng.choice(("", "", "n", "s", "r", "x"))

    def scrambled(self) -> str:
        return "".join(self.rng.choice(_CHARACTERS) for _ in range(self.rng.randint(2, 7)))

    def word(self) -> str:
        rng = self.rng
        kinds = (
            "noun",
            "adjective",
            "verb",
            "preposition",
            "little",
            "invented",
            "number",
            "world",
            "odd",
            "foreign",
        )
        kind = rng.choices(kinds, (38, 8, 6, 8, 10, 20, 3, 4, 1.5, 1.5))[0]
        lists = {
            "noun": NOUNS,
            "adjective": ADJECTIVES,
            "verb": VERBS,
            "preposition": PREPOSITIONS,
            "little": LITTLE,
            "world": NAMES + SHAPES,
            "foreign": _FOREIGN,
        }
        if kind in lists:
            return rng.choice(lists[kind])
        if kind == "number":
            return str(rng.randint(0, 2100))
        return self.invented() if kind == "invented" else self.scrambled()

    def salad(self, least: int, most: int) -> str:
        """Write random words, between least and most of them."""
        if self.brief:
            least, most = min(least, 3), min(most, 5)
        return " ".join(self._dressed(self.word()) for _ in range(self.rng.randint(least, most)))

    def _dressed(self, word: str) -> str:
        if self.rng.random() < 0.05:
            word = word.capitalize()
        return word + self.rng.choice(",,.:;!") if self.rng.random() < 0.09 else word

    def idea(self) -> str:
        """Write an idea for a picture, as people type it into a text-to-image prompt."""
        rng = self.rng
        if rng.random() < 0.55:
            clauses = 1 if self.brief else rng.choice((1, 1, 2))
            text = ", ".join(self._clause() for _ in range(clauses))
        else:
            text = self.salad(1, rng.choice((3, 8, 14)))
        text = text.rstrip(" .,:;!") or "cat"
        return text[:1].upper() + text[1:] if rng.random() < 0.2 else text

    def _clause(self) -> str:
        rng = self.rng
        words = [rng.choice(("a", "a", "the", "an", "two", "some"))] if rng.random() < 0.7 else []
        words += [rng.choice(ADJECTIVES) for _ in range(rng.choice((0, 1, 1, 2)))]
        words.append(self.invented() if rng.random() < 0.15 else rng.choice(NOUNS))
        if rng.random() < 0.4:
            words.append(rng.choice(VERBS))
        if rng.random() < 0.5:
            words += [rng.choice(PREPOSITIONS), rng.choice(("a", "the")), rng.choice(ADJECTIVES + NAMES)]
            words.append(rng.choice(NOUNS + SHAPES))
        return " ".join(words)

"""Words of the simulated platform: what its topics are called and how its videos are titled."""

from __future__ import annotations

from typing import NamedTuple


class Category(NamedTuple):
    """A broad category: the name of each of its topics and that topic's nouns."""

    name: str
    topics: dict[str, tuple[str, ...]]


def _topics(**nouns: str) -> dict[str, tuple[str, ...]]:
    return {name: tuple(words.split()) for name, words in nouns.items()}


CATEGORIES = (
    Category(
        "food",
        _topics(
            cooking="pasta dinner recipe soup kitchen sauce curry noodles",
            baking="bread cake cookies oven dough pastry frosting muffin",
            streetfood="market dumplings skewers stall tacos fritters vendor night",
            coffee="espresso latte beans barista roast grinder crema cup",
        ),
    ),
    Category(
        "sport",
        _topics(
            football="goal striker penalty match keeper dribble league cup",
            basketball="dunk court threepointer crossover rebound playoffs hoop team",
            fitness="workout squats abs plank dumbbell cardio stretch gym",
            cycling="bike climb gravel peloton wheels descent ride trail",
        ),
    ),
    Category(
        "animals",
        _topics(
            cats="kitten cat purring whiskers nap litter paws meow",
            dogs="puppy dog fetch retriever leash bark walk tail",
            wildlife="lion safari elephant savanna predator herd cheetah waterhole",
            aquarium="fish reef tank coral shrimp goby filter plants",
        ),
    ),
    Category(
        "music",
        _topics(
            guitar="guitar chords riff solo strings fingerstyle amp acoustic",
            dance="dance choreography hiphop moves shuffle stage crew steps",
            singing="cover vocals ballad duet karaoke harmony chorus mic",
            piano="piano sonata keys nocturne melody arpeggio pedal recital",
        ),
    ),
    Category(
        "games",
        _topics(
            shooter="headshot clutch sniper ranked squad loadout map spray",
            sandbox="blocks redstone castle survival farm mod village build",
            chess="opening endgame gambit checkmate blitz sacrifice knight puzzle",
            racing="lap drift circuit overtake pitstop kart simulator corner",
        ),
    ),
    Category(
        "style",
        _topics(
            makeup="eyeliner lipstick palette foundation blush contour brush glow",
            fashion="outfit jacket sneakers denim thrift wardrobe dress layering",
            hair="braid curls haircut fade dye ponytail shampoo bangs",
            nails="manicure gel polish glitter almond stickers cuticle tips",
        ),
    ),
    Category(
        "knowledge",
        _topics(
            space="planet rocket telescope galaxy orbit moon nebula launch",
            history="empire castle ruins battle dynasty archive treasure king",
            gadgets="phone laptop charger headphones camera keyboard unboxing battery",
            gardening="tomato seedlings compost roses pruning balcony soil greenhouse",
        ),
    ),
    Category(
        "life",
        _topics(
            travel="island train hostel backpack sunset temple coast passport",
            comedy="prank sketch roommate boss standup parody joke office",
            crafts="origami knitting clay resin wood crochet paper glue",
            cars="engine supercar garage turbo exhaust restoration wash roadtrip",
        ),
    ),
)

# Two words per style dimension, for its negative and its positive end.
_MOODS = ("calm", "wild", "cheap", "luxury", "funny", "serious", "easy", "expert")
_FORMS = ("vlog", "challenge", "tips", "showcase", "fails", "documentary", "tutorial", "masterclass")

_TOPICS = [(name, nouns) for category in CATEGORIES for name, nouns in category.topics.items()]


def topic_name(topic: int) -> str:
    """A word for topic `topic`; numbered once the written topics are used up."""
    turn, index = divmod(int(topic), len(_TOPICS))
    return _TOPICS[index][0] + (str(turn + 1) if turn else "")


def title(topic: int, moods: tuple[int, int], words: tuple[int, int]) -> str:
    """A readable title such as "easy pasta dinner tips"; moods index the ends of the two strongest style dimensions."""
    turn, index = divmod(int(topic), len(_TOPICS))
    nouns = _TOPICS[index][1]
    first = words[0] % len(nouns)
    second = (first + 1 + words[1] % (len(nouns) - 1)) % len(nouns)
    series = f" series {turn + 1}" if turn else ""
    return f"{_MOODS[moods[0]]} {nouns[first]} {nouns[second]} {_FORMS[moods[1]]}{series}"

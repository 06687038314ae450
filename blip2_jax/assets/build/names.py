"""Readable lower-case captions for the pictures, from the names in the Unicode character database.

Unicode names describe code points, not what a person sees: "heavy black heart" is a red heart, and "black" means only
"filled". The table mends those; everything else follows rules.
"""

from __future__ import annotations

import re

# The left side is Unicode's name in lower case, the right side what the picture shows.
_MENDED = {
    "hash key": "keycap hash",
    "keycap: *": "keycap asterisk",
    "face with ok gesture": "person gesturing ok",
    "face with no good gesture": "person gesturing no",
    "face throwing a kiss": "face blowing a kiss",
    "white smiling face": "smiling face",
    "heavy black heart": "red heart",
    "smiling face with smiling eyes and hand covering mouth": "smiling face with hand over mouth",
    "face with finger covering closed lips": "face with finger on lips",
    "face with one eyebrow raised": "face with raised eyebrow",
    "serious face with symbols covering mouth": "face with symbols on mouth",
    "white left pointing backhand index": "hand pointing left",
    "white right pointing backhand index": "hand pointing right",
    "white up pointing backhand index": "back of hand pointing up",
    "white down pointing backhand index": "hand pointing down",
    "white up pointing index": "hand pointing up",
    "reversed hand with middle finger extended": "middle finger",
    "raised hand with part between middle and ring fingers": "vulcan salute",
    "fisted hand sign": "oncoming fist",
    "i love you hand sign": "love you hand gesture",
    "man with gua pi mao": "person with skullcap",
    "adult": "person",
    "face palm": "person facepalming",
    "shrug": "person shrugging",
    "face massage": "person getting massage",
    "haircut": "person getting haircut",
    "pedestrian": "person walking",
    "runner": "person running",
    "dancer": "woman dancing",
    "horse racing": "jockey on a horse",
    "wrestlers": "people wrestling",
    "rowboat": "person rowing boat",
    "water polo": "person playing water polo",
    "handball": "person playing handball",
    "juggling": "person juggling",
    "bath": "person taking bath",
    "sleeping accommodation": "person in bed",
    "breast-feeding": "breastfeeding",
    "bust in silhouette": "silhouette of a head",
    "busts in silhouette": "silhouette of two heads",
    "medium black circle": "black circle",
    "medium white circle": "white circle",
    "black right-pointing triangle": "play button",
    "black left-pointing triangle": "reverse button",
    "black right-pointing double triangle": "fast forward button",
    "black left-pointing double triangle": "fast reverse button",
    "black up-pointing double triangle": "fast up button",
    "black down-pointing double triangle": "fast down button",
    "up-pointing small red triangle": "upwards button",
    "down-pointing small red triangle": "downwards button",
    "up-pointing red triangle": "red triangle pointing up",
    "down-pointing red triangle": "red triangle pointing down",
    "twisted rightwards arrows": "shuffle button",
    "clockwise rightwards and leftwards open circle arrows": "repeat button",
    "clockwise rightwards and leftwards open circle arrows with circled one overlay": "repeat single button",
    "clockwise downwards and upwards open circle arrows": "clockwise vertical arrows",
    "anticlockwise downwards and upwards open circle arrows": "anticlockwise vertical arrows",
    "upwards black arrow": "up arrow",
    "downwards black arrow": "down arrow",
    "leftwards black arrow": "left arrow",
    "black rightwards arrow": "right arrow",
    "north east arrow": "up right arrow",
    "north west arrow": "up left arrow",
    "south east arrow": "down right arrow",
    "south west arrow": "down left arrow",
    "arrow pointing rightwards then curving upwards": "right arrow curving up",
    "arrow pointing rightwards then curving downwards": "right arrow curving down",
    "leftwards arrow with hook": "right arrow curving left",
    "rightwards arrow with hook": "left arrow curving right",
    "back with leftwards arrow above": "back arrow",
    "end with leftwards arrow above": "end arrow",
    "on with exclamation mark with left right arrow above": "on arrow",
    "soon with rightwards arrow above": "soon arrow",
    "top with upwards arrow above": "top arrow",
    "black scissors": "scissors",
    "black nib": "fountain pen nib",
    "black telephone": "telephone",
    "black sun with rays": "sun",
    "white medium star": "star",
    "black universal recycling symbol": "recycling symbol",
    "white heavy check mark": "check mark button",
    "heavy check mark": "check mark",
    "ballot box with check": "check box with check",
    "negative squared cross mark": "cross mark button",
    "heavy large circle": "hollow red circle",
    "heavy multiplication x": "multiplication sign",
    "heavy plus sign": "plus sign",
    "heavy minus sign": "minus sign",
    "heavy division sign": "division sign",
    "heavy equals sign": "equals sign",
    "heavy dollar sign": "dollar sign",
    "heavy exclamation mark symbol": "red exclamation mark",
    "white exclamation mark ornament": "white exclamation mark",
    "black question mark ornament": "red question mark",
    "white question mark ornament": "white question mark",
    "eight pointed black star": "eight pointed star",
    "black spade suit": "spade suit",
    "black heart suit": "heart suit",
    "black diamond suit": "diamond suit",
    "black club suit": "club suit",
    "playing card black joker": "joker playing card",
    "hocho": "kitchen knife",
    "aubergine": "eggplant",
    "seat": "airplane seat",
    "foggy": "city in fog",
    "part alternation mark": "yellow peak mark",
    "put litter in its place symbol": "litter in bin sign",
    "automated teller machine": "atm sign",
    "speaker with cancellation stroke": "muted speaker",
    "bell with cancellation stroke": "bell with slash",
    "e-mail symbol": "e-mail",
    "rescue worker’s helmet": "helmet with white cross",
    "left-pointing magnifying glass": "magnifying glass tilted left",
    "right-pointing magnifying glass": "magnifying glass tilted right",
    "mobile phone with rightwards arrow at left": "mobile phone with arrow",
    "input symbol for latin capital letters": "button with capital letters abcd",
    "input symbol for latin small letters": "button with small letters abcd",
    "input symbol for numbers": "button with numbers 1234",
    "input symbol for symbols": "button with symbols",
    "input symbol for latin letters": "button with letters abc",
    "negative squared latin capital letter a": "letter a button",
    "negative squared latin capital letter b": "letter b button",
    "negative squared latin capital letter o": "letter o button",
    "negative squared latin capital letter p": "parking sign",
    "negative squared ab": "letters ab button",
    "circled latin capital letter m": "circled letter m",
    "squared up with exclamation mark": "up button",
    "squared katakana koko": "japanese button here",
    "squared katakana sa": "japanese button service charge",
    "squared cjk unified ideograph-6708": "japanese button monthly amount",
    "squared cjk unified ideograph-6709": "japanese button not free of charge",
    "squared cjk unified ideograph-6307": "japanese button reserved",
    "circled ideograph advantage": "japanese button bargain",
    "squared cjk unified ideograph-5272": "japanese button discount",
    "squared cjk unified ideograph-7121": "japanese button free of charge",
    "squared cjk unified ideograph-7981": "japanese button prohibited",
    "circled ideograph accept": "japanese button acceptable",
    "squared cjk unified ideograph-7533": "japanese button application",
    "squared cjk unified ideograph-5408": "japanese button passing grade",
    "squared cjk unified ideograph-7a7a": "japanese button vacancy",
    "circled ideograph congratulation": "japanese button congratulations",
    "circled ideograph secret": "japanese button secret",
    "squared cjk unified ideograph-55b6": "japanese button open for business",
    "squared cjk unified ideograph-6e80": "japanese button no vacancy",
}
# Two entries of the data share the name "MAN IN TUXEDO"; the gender-neutral one is told apart by its code point.
_MENDED_BY_CODE_POINT = {"1F935": "person in tuxedo"}

_TRAILING_WORDS = ("hand sign", "hands sign", "up sign", "down sign", "moon symbol", "collision symbol", "dizzy symbol")


def caption(entry: dict) -> str:
    """The caption of one entry of emoji.json, lower case, without the characters that BLIP's processor strips."""
    name = entry["name"].lower()
    if entry["unified"] in _MENDED_BY_CODE_POINT:
        return _MENDED_BY_CODE_POINT[entry["unified"]]
    if name in _MENDED:
        return _MENDED[name]
    if entry["subcategory"] in ("country-flag", "subdivision-flag"):
        name = "flag of " + re.sub(r"\s*\(.*?\)", "", name.removesuffix(" flag")).replace(" - ", " ")
    if match := re.fullmatch(r"(man|woman|person): bald", name):
        name = f"bald {match[1]}"
    elif match := re.fullmatch(r"(man|woman|person): (.*)", name):
        name = f"{match[1]} with {match[2]}"
    elif match := re.fullmatch(r"(kiss|couple with heart): (\w+), (\w+)", name):
        name = f"{match[1]} of {match[2]} and {match[3]}"
    elif match := re.fullmatch(r"family: (.*), (\w+)", name):
        name = f"family of {match[1]} and {match[2]}"
    elif match := re.fullmatch(r"squared (\w+)", name):
        name = f"{match[1]} button"
    elif match := re.fullmatch(r"clock face (.*?)[- ](oclock|thirty)", name):
        name = f"clock face at {match[1]} {'o’clock' if match[2] == 'oclock' else 'thirty'}"
    if name.endswith(_TRAILING_WORDS):
        name = name.rsplit(" ", 1)[0]
    name = name.replace("&", "and").replace("’", "'").replace("u.s.", "us")
    name = re.sub(r"\b((?:wo)?m[ae]n)s\b", r"\1's", name)
    name = re.sub(r'[.!"()*#:;~]', " ", name)
    return re.sub(r"\s+", " ", name).strip()


def family(entry: dict) -> str:
    """What remains of an entry's code points without gender, direction and skin tone.

    "woman walking" and "person walking facing right" are the same thing in other clothes; a split that promises never
    seen things must keep such relatives on one side.
    """
    people = {"1F468", "1F469", "1F9D1"}
    decorations = {"2640", "2642", "27A1", "FE0F", "200D"}
    code_points = entry["unified"].split("-")
    rest = [point for point in code_points if point not in people | decorations]
    return "-".join(rest or code_points)

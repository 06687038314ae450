"""Make tests/golden/captions anew: hard captions, and what pycocoevalcap says of them.

    pip install 'blip2_jax[java]'    and a Java, 17 at the last time
    python -m tests.evaluation.make_captions
    python -m tests.evaluation.make_captions --compare=100000    # Tokens of other captions, recording nothing.

corpus.jsonl.xz has a picture a line: `prediction`, `references`, and `tokens` of the one and the others, joined by
spaces. scores.json has the scores of all pictures and of some subsets.
"""

from __future__ import annotations

import argparse
import json
import lzma
import pathlib
import random
from collections.abc import Sequence

import numpy as np

from blip2_jax.data.sources import open_source
from blip2_jax.evaluation import ptb

FOLDER = pathlib.Path(__file__).parent.parent / "golden" / "captions"
PICTURES = 5000
# Which pictures each set of scores is of.
SUBSETS = {"all": (0, PICTURES), "first": (0, 1), "hundred": (0, 100), "thousand": (1000, 2000), "last": (4500, 5000)}

SUBJECTS = """
a man|the old woman|two dogs|a cat's owner|Mr. Smith|Mrs. O'Brien|Dr. King Jr.|the U.S. flag|a 10-year-old girl
|the boys' team|three sheep|somebody|a "stop" sign|an 'open' sign|people|a mother-in-law|the co-op's clerk
|St. Bernard dogs|a Coca-Cola can|the AT&T logo|R&B singers|an x-ray|a T-shirt|the café's owner|a naïve piñata
|“Big Ben”|a ‘tiny’ bird|Qur'an readers|Hawai'i surfers|a d'Avignon bridge|J.R.R. Tolkien|the N.Y.P.D.|a B-52
|an F/A-18 jet|nobody|he|it|I|Prof. Lee|Gov. Brown|an iPhone 6s|a 4x4|the 2nd place runner|No. 5|no. 23
|a jack-o'-lantern|rock 'n' roll fans|y'all"""
VERBS = """
is sitting|sits|isn't standing|can't see|cannot find|won't eat|doesn't like|'s holding|they've got|he'd like
|it'll rain|gonna ride|wanna play|gotta catch|'tis|lemme see|gimme|dunno|rides/drives|and/or walks|looks at
|is looking-at|didn’t hold|I'm eating|you're watching|we'll share|c'mon and push|is parked next to
|was built in 1925 by|costs|reads:|says,|goes...|— jumps —|-- runs --|smiles :) at|frowns :( at|winks ;-) at
|shouldn't've had|ain't|must've left|let's keep"""
OBJECTS = """
a frisbee|the ball (red)|[a kite]|{a vase}|<b>bold</b>|a $5.00 bill|US$ 3|£5 notes|€20|5¢|50% off|1/2 of a pizza
|1 1/2 pies|½ cup|3-4 apples|10,000 people|1,234.56|3:30pm|5 p.m. train|9:00 a.m.|12/25/2010|Dec. 25th|the '90s
|the 1980s|'80s cars|5'10" tall|6" sub|100°F weather|12°C|#1 fan|#sunset|@home|bob@mail.com
|http://www.example.com/a?b=c|www.coco.org/x.|flickr.com|photo.jpg|IMG_2012.JPG|a C++ book|C# code|vitamin C.
|plan B.|the letter A.|Washington D.C.|Inc. signs|etc.|e.g. fruit|i.e. bananas|vs. them|St. Louis|Mt. Fuji
|5th Ave.|Main St.|approx. two|fig. 3|555-1234|(555) 555-1234|+1 212 555 1234|24/7|M&M's|Ben & Jerry's|B&amp;B
|&quot;hi&quot;|3 &lt; 4|tom &amp; jerry|a*b|2+2=4|x<3|a_b|~5 ft.|± 2|² tiles|®|™|©|•|日本語|한국어 text|мир|emoji 😀
|👍🏽|naïve Ωmega|fiancée|cafe\u0301|back\\slash|soft\u00adhyphen|a\u00a0b|thin\u2009space|wide\u3000space
|zero\u200bwidth|bom\ufeffhere|non\u2011breaking|a…b|wait…|. . .|....|??|?!|!!!|''|``quoted''|""|« ici »|„unten“
|‹x›|it’s|O’Reilly’s|the dogs’|rock ’n’ roll|’70s|sh*t|a/c|w/o|9-to-5|self-made|well—known|2–3|Jan. 1|Ph.D.s
|U.K.|u.s.a.|O.K.|T.V.|tv|A.|I.|10.|v. 2|p. 7|no. x|Corp. office|Bros. circus|the end."""
ENDS = [
    "",
    "",
    ".",
    ".",
    ".",
    " .",
    "!",
    "?",
    "...",
    ",",
    ";",
    " -",
    '."',
    ".'",
    "…",
    "。",
    ".)",
    "..",
    " !!",
    ":",
    "\u00a0",
    "\t",
]
JOINS = [
    " ",
    " ",
    " ",
    " ",
    " ",
    "  ",
    ", ",
    " - ",
    " & ",
    "/",
    "-",
    ". ",
    ".",
    "; ",
    " with ",
    " and ",
    "\n",
    "\t",
    "\u00a0",
]
MASKS = "aeinst'\"-.,:/&$#@()%5 5 '-.,…’“”—é€½"


def words(text: str) -> list[str]:
    return text.replace("\n", "").split("|")


def sentence(draw: random.Random) -> str:
    """Something hard, perhaps as nobody would write it."""
    kind = draw.random()
    if kind < 0.06:  # No language at all.
        return "".join(draw.choice(MASKS) for _ in range(draw.randrange(12)))
    parts = [draw.choice(words(SUBJECTS)), draw.choice(words(VERBS)), draw.choice(words(OBJECTS))]
    while draw.random() < 0.35:
        parts.append(draw.choice(words(draw.choice([SUBJECTS, VERBS, OBJECTS]))))
    text = parts[0]
    for part in parts[1:]:
        text += (draw.choice(JOINS) if draw.random() < 0.3 else " ") + part
    text += draw.choice(ENDS)
    if draw.random() < 0.5:
        text = text[:1].upper() + text[1:]
    return text.upper() if draw.random() < 0.04 else text


def altered(text: str, draw: random.Random) -> str:
    """A caption as a model might have written it instead."""
    found = text.split(" ")
    for _ in range(draw.randrange(4)):
        place = draw.randrange(len(found) + 1)
        change = draw.randrange(4)
        if change == 0:
            found.insert(place, draw.choice(["a", "the", "red", "on", "big", "and"]))
        elif change == 1 and place < len(found):
            del found[place]
        elif change == 2:
            draw.shuffle(found)
        else:
            found = found[:place]
    return " ".join(found)


def corpus() -> list[dict]:
    """Pictures, each a prediction and one to five references: a third from nano's captions, the others made up."""
    splits = ("train", "train_tones", "val_drawing", "val_concept", "test_drawing", "test_concept")
    sources = [open_source(f"nano:{split}") for split in splits]
    nano = [caption for source in sources for index in range(len(source)) for caption in source[index]["captions"]]
    draw = random.Random(7)
    pictures = []
    for _ in range(PICTURES):
        plain = draw.random() < 0.33
        if plain:
            first = f"{draw.choice(['a drawing of', 'Drawing:', 'the', 'A'])} {draw.choice(nano)}{draw.choice(ENDS)}"
        else:
            first = sentence(draw)
        others = [altered(first, draw) if draw.random() < 0.4 else sentence(draw) for _ in range(draw.randrange(5))]
        prediction = "" if draw.random() < 0.01 else altered(first, draw)
        pictures.append({"prediction": prediction, "references": [first, *others]})
    return pictures


def judge(tokens: Sequence[list[str]]) -> dict[str, float]:
    """What pycocoevalcap says of some pictures, whose tokens are joined by spaces, the prediction's first."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    right = {index: found[1:] for index, found in enumerate(tokens)}
    predicted = {index: found[:1] for index, found in enumerate(tokens)}
    bleu, _ = Bleu(4).compute_score(right, predicted, verbose=0)
    scores = {f"bleu_{n}": value for n, value in enumerate(bleu, 1)}
    scores["rouge_l"] = Rouge().compute_score(right, predicted)[0]
    scores["cider"] = Cider().compute_score(right, predicted)[0]
    return {name: float(np.float64(value)) for name, value in scores.items()}


def java_tokens(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    """Of the captions of each picture, joined by spaces."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({key: [{"caption": text} for text in found] for key, found in texts.items()})


def compare(count: int, seed: int) -> None:
    """Print how many captions have other tokens than there: hard ones, and one of every character of two planes."""
    draw = random.Random(seed)
    captions = [sentence(draw) for _ in range(count)]
    ends = "\n\r\u000b\u000c\u0085\u2028\u2029"  # What ends a line there has captions change places.
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x20000)) if chr(code) not in ends]
    captions += [f"xa{c}bx {c} 1{c}2 '{c}b .{c}" for c in characters]
    found = [" ".join(tokens) for tokens in ptb.tokenize(captions)]
    there = java_tokens({index: [text] for index, text in enumerate(captions)})
    differ = [(text, own, there[i][0]) for i, (text, own) in enumerate(zip(captions, found, strict=True))]
    differ = [trio for trio in differ if trio[1] != trio[2]]
    for text, own, there in differ[:20]:
        print(f"{text!r}\n  here  {own!r}\n  there {there!r}")
    print(f"{len(captions)} captions, {len(differ)} with other tokens")


def record() -> None:
    pictures = corpus()
    for texts in ([[p["prediction"]] for p in pictures], [p["references"] for p in pictures]):
        for key, found in java_tokens(dict(enumerate(texts))).items():
            pictures[key].setdefault("tokens", []).extend(found)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with lzma.open(FOLDER / "corpus.jsonl.xz", "wt", encoding="utf-8", preset=9) as file:
        for picture in pictures:
            file.write(json.dumps(picture, ensure_ascii=False) + "\n")
    tokens = [picture["tokens"] for picture in pictures]
    scores = {name: judge(tokens[first:last]) for name, (first, last) in SUBSETS.items()}
    (FOLDER / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    print(f"{len(tokens)} predictions and {sum(map(len, tokens)) - len(tokens)} references")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=int, metavar="N", help="only compare the tokens of N captions made up")
    parser.add_argument("--seed", type=int, default=1, help="of those")
    options = parser.parse_args()
    if options.compare is None:
        record()
    else:
        compare(options.compare, options.seed)


if __name__ == "__main__":
    main()

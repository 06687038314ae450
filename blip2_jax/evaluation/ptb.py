"""Penn Treebank tokens of English text, as published caption scores have been computed on.

Those scores come from pycocoevalcap, which runs the PTBTokenizer of Stanford CoreNLP 3.4.1 (2014) with `-preserveLines
-lowerCase` and drops punctuation. Here are the same tokens without Java. What counts as a word, a number, an
abbreviation was learnt from how that lexer is described and from comparing with it, oddities included: "sits.then" is
one token, "can't" two, brackets become "-lrb-" and "-rrb-" and stay, emoji vanish.

It is a lexer: at each place the rule that reaches farthest, what it looks ahead at included, makes the next token, and
of rules that reach equally far the first.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from blip2_jax.evaluation import ptb_characters

VERSION = "1, as Stanford CoreNLP 3.4.1 by way of pycocoevalcap 1.2"

# What pycocoevalcap drops; it lists brackets as well, but in upper case, and so they stay.
PUNCTUATION = frozenset(("''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"))


def _any_case(pattern: str) -> str:
    """`pattern` with ASCII letters in either case."""
    return f"(?ai:{pattern})"


def _one_of(words: str) -> str:
    """One of some space-separated patterns, in either case."""
    return _any_case("|".join(words.split()))


def _capitalised(words: str) -> str:
    """One of some space-separated patterns whose first letter must be as it is written."""
    return "(?:" + "|".join(word[0] + _any_case(word[1:]) for word in words.split()) + ")"


# Characters. In these patterns brackets hold what was case-sensitive there, words what was not.
_L, _D, _MARKS, _SYMBOLS = map(ptb_characters.members, ptb_characters.TABLES)
_ENTITY = rf"&[aeiouAEIOU]{_any_case('(?:acute|grave|uml);')}"
_LETTER = rf"(?:[{_L}{_MARKS}]|{_ENTITY})"
_LETTER_OR_DIGIT = rf"(?:[{_L}{_MARKS}{_D}]|{_ENTITY})"
_PLAIN = rf"[{_L}{_D}]"
_SPACE = r"[ \t\u00a0\u2000-\u200a\u3000]"
_SPACE_OR_END = rf"(?:{_SPACE}|\n)"
_HYPHEN = r"[-_\u058a\u2010\u2011]"
_STOP = r"[,;:\u3001]"
_APOSTROPHE = rf"(?:['\u0092\u2019]|{_any_case('&apos;')})"
_APOSTROPHE_OR_BACKQUOTE = rf"(?:['\u0092\u2019`\u0091\u2018\u201b]|{_any_case('&apos;')})"

# Words.
_TWO_IN_ONE = "cannot gonna gotta lemme gimme wanna"
_WORD = rf"{_LETTER}{_LETTER_OR_DIGIT}*(?:[.!?]{_LETTER}{_LETTER_OR_DIGIT}*)*"
_CLITIC = rf"{_APOSTROPHE}(?:[msdMSD]|{_one_of('re ve ll')})"
_NOT = rf"{_any_case('n')}{_APOSTROPHE_OR_BACKQUOTE}{_any_case('t')}"
_BEFORE_NOT = r"[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*"
_WITH_APOSTROPHE = (
    rf"{_APOSTROPHE}{_any_case('n')}{_APOSTROPHE}?",  # rock 'n' roll
    rf"{_APOSTROPHE}(?:{_one_of('till? em cause')}|[2-9]0{_any_case('s')})",
    rf"(?:[lLdDjJ]|{_one_of('dunkin somethin ol')}){_APOSTROPHE}",
    rf"[A-HJ-XZn]{_APOSTROPHE_OR_BACKQUOTE}[{_L}]{{2,}}",  # O'Brien
    rf"[{_L}]+[aeiouyAEIOUY]{_APOSTROPHE_OR_BACKQUOTE}[aeiouA-Z][{_L}]*",  # Hawai'i
    rf"[oO]{_APOSTROPHE_OR_BACKQUOTE}[oO]",
    _one_of(r"cont'd\.? nor'easter c'mon e'er s'mores ev'ry li'l nat'l"),
)
_ELISION = rf"(?:[dDoOlL]{_APOSTROPHE_OR_BACKQUOTE}{_PLAIN})?"
_COMPOUND = rf"{_ELISION}{_PLAIN}+(?:{_HYPHEN}{_ELISION}{_PLAIN}+)*"
_WITH_AMPERSAND = rf"[A-Z]+(?:(?:{_any_case('&amp;')}|[+&])[A-Z]+)+"
_BETWEEN_SLASHES = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_WITH_SLASH = rf"{_BETWEEN_SLASHES}(?:\\?/{_BETWEEN_SLASHES}){{1,2}}"

# Abbreviations. After those of _ENDING a sentence may end, which lets them look two characters ahead.
_US = _one_of(r"(?:Canada|Sino|Korean|EU|Japan|non)-U\.S U\.S\.-(?:U\.K|U\.S\.S\.R)")
_INITIALS = rf"(?:{_US}|[A-Za-z](?:\.[A-Za-z])*)"
_HYPHENED = r"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:[A-Za-z](?:\.[A-Za-z])+\.|[A-Za-z0-9\u00ad]+))+"
_ENDING = (
    rf"(?:{_any_case('pp?t')}[ye]{_any_case('s?')}|{_capitalised('Az Ark Del Ill La Mass Miss Ore Pa Tex Wash')}|"
    + _one_of(
        r"Al Ala Apr Ariz Assn Aug Bancorp Bhd Bldg Blvd Bros Calif Colo Conn Corp Cos? Ct Dak Dec (?:Ed|Ph)\.D Esq "
        "Est Etc Ext Feb Fla Fri Ga Inc Ind Intl Jan Jr Jul Jun Kans? Ky Ltd Mar Md Mich Minn Mo Mon Mont Neb Nev Nov "
        "Oct Okla Penn Plc Rd Rt Sept? Seq Sq Sr Sys Tel Tenn Thu Thurs Tues? Univ Va Vt Wed Wisc? Wyo"
    )
    + r")\."
)
_LEADING = (
    rf"(?:{_INITIALS}|{_any_case('m')}[ft]{_any_case('g')}|{_capitalised('Miss')}|"
    + _one_of(
        r"A\.k\.a Adj Adm Adv Alex Assoc Asst Attys? Ave Brig Capt Cf Cie Cmdr Col Comdr Cpl Dept Det Drs? Elec Ens Ft "
        "Gen Govs? Hon Insp Invt Jos Lieut Lt Maj Messrs Mlle Mme Mr Mrs Ms Msgr Mt Natl Pfc Ph Pres Profs? Pvt Reps? "
        "Rev Sens? Sfc Sgt Spc Ste? Supts? Treas Vs Wm"
    )
    + ")"
)
_BEFORE_NUMBER = rf"{_one_of('art bldg ca figs? nos? op pp prop')}\."
# Before one of these a single letter is no initial: its full stop is dropped.
_SENTENCE_BEGINS = _capitalised(
    r"About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More Mr\. Ms\. "
    "Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You"
)

# Numbers.
_SEPARATED = rf"[.:,\u00ad\u066b\u066c][{_D}]+"
_NUMBER = rf"[-+]?(?:[{_D}]+(?:{_SEPARATED})*|(?:{_SEPARATED})+)"
_ONE_OR_TWO, _UP_TO_FOUR = rf"[{_D}]{{1,2}}", rf"[{_D}]{{1,4}}"
_DATE = rf"{_ONE_OR_TWO}[-/]{_ONE_OR_TWO}[-/][{_D}]{{2,4}}"
_FRACTION = rf"(?:{_UP_TO_FOUR}[- \u00a0])?{_UP_TO_FOUR}(?:\\?/|\u2044){_UP_TO_FOUR}"
_RAISED = r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"
_GAP = r"[- \u00a0]"
_AREA = rf"\([0-9]{{2,3}}\)[ \u00a0]?|\+{{0,2}}(?:[0-9]{{2,4}}{_GAP}){{1,2}}"
_PHONES = (
    rf"(?:{_AREA})[0-9]{{3,4}}{_GAP}?[0-9]{{3,5}}",
    r"(?:\+{0,2}[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
)
_CURRENCY = r"[\u0080\u00a2-\u00a5\u060b\u0e3f\u20a0\u20a4\u20ac\uffe0\uffe1\uffe5\uffe6]"

# The web.
_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_ATTRIBUTE = rf"{_NAME}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?"
_TAG = rf"<(?:[!?][A-Za-z\-][^>\n]*|{_NAME}(?: +{_ATTRIBUTE})* */?|/{_NAME}) *>"
_NEVER = r" \t\n\f\"<>|()"  # In an address.
_AT_END = rf"[^{_NEVER}.!?{{}},\-]"
_URL = rf"{_any_case('https?')}://[^{_NEVER}{{}}]+{_AT_END}"
_PATH = rf"/[^{_NEVER}]+{_AT_END}"
_PART = rf"[^{_NEVER}.!?{{}},]"
_SMALL_PART = rf"[^{_NEVER}.!?{{}}$`',-_]"  # The hyphen makes a range, which holds capitals and digits.
_HOSTS = (
    rf"{_any_case('www')}\.(?:{_PART}+\.)+[a-zA-Z]{{2,4}}",
    rf"{_any_case('www')}\.(?:{_PART}+?\.)+?[a-zA-Z]{{2,4}}{_PATH}",
    rf"(?:{_SMALL_PART}+\.)+{_one_of('com net org edu')}",
    rf"(?:{_SMALL_PART}+\.)+?{_one_of('com net org edu')}{_PATH}",
)
_BEFORE_AT, _BEHIND_AT = rf"[^{_NEVER}\u00a0{{}}]", rf"[^{_NEVER}\u00a0{{}}.]"
_EMAIL = (
    rf"(?:<|{_any_case('&lt;')})?[a-zA-Z0-9]{_BEFORE_AT}*@(?:{_BEHIND_AT}+\.)*{_BEHIND_AT}+(?:{_any_case('&gt;')}|>)?"
)
_MENTION = rf"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER}+"
_ENDINGS = (
    "bat bmp bz2 class cgi cpp c dll docx? exe gif gz html? h jar java jpe?g mov mp3 pdf php pl png ppt ps py sql tar "
    "txt wav xml x zip"
)
_FILE = rf"{_LETTER_OR_DIGIT}+(?:\.{_LETTER_OR_DIGIT}+)*\.{_one_of(_ENDINGS)}"

# Signs.
_DASH = rf"{_one_of('&md; &mdash; &ndash;')}|[\u0096\u0097\u2013-\u2015]"
_QUOTES = rf"''|[`\u2018-\u201f\u0091-\u0094\u2039\u203a\u00ab\u00bb]{{1,2}}|{_APOSTROPHE}"
_SMILEY = r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]"
_EYE = "[-^x=~<>']"
_FACE = rf"\({_EYE}[_.]?{_EYE}\)|\((?!-){_EYE}-(?:(?!-){_EYE}|`)\)|{_EYE}_{_EYE}"
_ELLIPSIS = r"\.{3,5}|\u2026|(?:\.[ \u00a0]){2,4}\."

_NORMALISED = {
    **dict.fromkeys("\u0091\u2018\u201b\u2039", "`"),
    **dict.fromkeys("\u0092\u2019\u203a", "'"),
    **dict.fromkeys("\u0093\u201c\u00ab", "``"),
    **dict.fromkeys('\u0094\u201d\u00bb"', "''"),
    **dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$"),
    **{"\u00a2": "cents", "\u00a3": "#", "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4"},
    **{"\u2153": "1/3", "\u2154": "2/3", " ": "\u00a0"},
    **{"(": "-LRB-", ")": "-RRB-", "{": "-LCB-", "}": "-RCB-", "[": "-LSB-", "]": "-RSB-"},
}
_NAMED = {"&apos;": "'", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_NAMES = re.compile(f"&(?:apos|quot);|{_one_of('&amp; &lt; &gt;')}")  # Two of them in lower case alone.


def _as_is(token: str) -> str:
    return token


def _unhyphened(token: str) -> str:
    """Without soft hyphens."""
    return token.replace("\u00ad", "") or "-"


def _normalised(token: str) -> str:
    """Quotes, brackets, currencies and fractions as the treebank writes them; spaces do not break."""
    return "".join(_NORMALISED.get(character, character) for character in token)


def _unnamed(token: str) -> str:
    """Character entities as characters, and these as the treebank writes them."""
    return _normalised(_NAMES.sub(lambda found: _NAMED[found[0].lower()], token))


def _bracketed(token: str) -> str:
    """Round brackets as the treebank writes them."""
    return token.replace("(", "-LRB-").replace(")", "-RRB-").replace(" ", "\u00a0")


class _Rule(NamedTuple):
    """Attributes:
    pattern: the token as group 1, and what must follow.
    token: what becomes of the text of group 1, None for nothing.
    given_back: characters of group 1 that begin the next token.
    """

    pattern: re.Pattern
    token: Callable[[str], str] | None
    given_back: int = 0


def _rule(pattern: str, token: Callable[[str], str] | None = _as_is, before: str = "", given_back: int = 0) -> _Rule:
    return _Rule(re.compile(f"({pattern}){before}"), token, given_back)


_RULES = (
    _rule(_one_of(r"c\+\+ c\#")),
    _rule(_one_of("cannot 'twas"), given_back=3),
    _rule(_one_of(f"'tis {_TWO_IN_ONE.removeprefix('cannot')}"), given_back=2),
    _rule(_TAG, lambda token: token.replace(" ", "\u00a0")),
    _rule(_DASH, lambda token: "--"),
    _rule(_any_case("&amp;"), _unnamed),
    _rule(_any_case("&(?:ht|tl|ur|lr|qc|ql|qr|odq|cdq|#[0-9]+);")),
    _rule(_WORD, _unhyphened, before=_CLITIC),
    _rule(_BEFORE_NOT, _unhyphened, before=_NOT),
    _rule(_WORD, _unhyphened),
    *map(_rule, _WITH_APOSTROPHE),
    _rule(_any_case("y") + _APOSTROPHE, before=f"[{_L}]"),
    *map(_rule, (_URL, *_HOSTS, _EMAIL, _MENTION)),
    _rule(_CLITIC, _unnamed, before="[^A-Za-z]"),
    _rule(_NOT, _unnamed, before="[^A-Za-z]"),
    _rule(_DATE),
    _rule(_NUMBER, _unhyphened),
    _rule(_RAISED),
    _rule(_FRACTION, _normalised),
    _rule(r"[\u00bc\u00bd\u00be\u2153-\u215e]", _normalised),
    _rule(_one_of(r"-[rl][rcs]b- c\.d\.s pro- anti- s(?:&amp;|&)(?:p-500|ls)"), _unnamed),
    _rule(f"{_any_case('cap')}{_APOSTROPHE}{_any_case('n')}|{_any_case('c')}{_APOSTROPHE}{_any_case('est')}"),
    _rule(_WITH_SLASH),
    _rule(r"[A-Z]*\$|\#"),
    _rule(_CURRENCY, _normalised),
    _rule(r"[A-Za-z]\.", before=rf"{_SPACE_OR_END}+(?:{_SENTENCE_BEGINS}|{_TAG}){_SPACE_OR_END}", given_back=1),
    _rule(_BEFORE_NUMBER, before=rf"{_SPACE_OR_END}?[{_D}]"),
    _rule(rf"(?:{_any_case('pt')}[eyEY]|{_any_case('co')})\.", before=_SPACE + _one_of("ltd lim")),
    _rule(_ENDING, before=r"[\s\S]{2}"),
    _rule(_ENDING),
    _rule(rf"{_LEADING}\."),
    _rule(_LEADING, before=_SPACE),
    _rule(_INITIALS, before=_SPACE_OR_END),
    _rule(rf"{_APOSTROPHE}[0-9][0-9]", before=_SPACE_OR_END),
    _rule(_FILE, before=rf"(?:{_SPACE_OR_END}|[.?!,])"),
    _rule(rf"{_WORD}\.", _unhyphened, before=_STOP),
    *(_rule(phone, _bracketed) for phone in _PHONES),
    _rule(f'"|{_any_case("&quot;")}', _unnamed),
    _rule(f"[<>]|{_one_of('&lt; &gt;')}", _unnamed),
    _rule(_SMILEY, _bracketed, before="[^A-Za-z0-9]"),
    _rule(_FACE, _bracketed),
    _rule(r"[{}\[\]()]", _normalised),
    _rule("-+", lambda token: "--" if len(token) in (3, 4) else token),
    _rule(_ELLIPSIS, lambda token: "..."),
    _rule(r"@+|\#+|_+|\*+|(?:\\\*){1,3}"),
    _rule(_STOP),
    _rule(r"[?!]+|[.=/\u00a1\u00bf\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002]"),
    _rule(rf"{_HYPHENED}\.", _unhyphened, before=_STOP),
    _rule(_HYPHENED, _unhyphened),
    _rule(rf"{_COMPOUND}\.", before=_STOP),
    _rule(_COMPOUND),
    _rule(rf"{_WITH_AMPERSAND}\.", _unnamed, before=_STOP),
    _rule(_WITH_AMPERSAND, _unnamed),
    _rule("'", before=r"[A-Za-z][^ \t\n\u00a0]"),
    _rule(_CLITIC, _unnamed),
    _rule(_NOT, _unnamed),
    _rule(_QUOTES, _unnamed),
    _rule(rf"<<|>>|[\u2044+%&~^|\\{_SYMBOLS}]"),
    _rule(rf"{_SPACE}+|{_any_case('&nbsp;')}", None),
)
# Between plain spaces most is what only rules of words match, and they alike, so that the rules need not be tried.
_SPACES = re.compile(rf"(?:[ \t]{_SPACE}*)?")
_ONE_WORD = rf"(?!{_one_of(_TWO_IN_ONE)}\b)[A-Za-z]+"
_COMMON = re.compile(rf"{_ONE_WORD}(?=,?[ \n])|[.,](?=\n)")
_COMMON_BEFORE_STOP = re.compile(rf"(?!{_ENDING}|{_LEADING}\.|{_BEFORE_NUMBER}){_ONE_WORD}(?=\.[ \n])")
_LINE_ENDS = re.compile(r"[\n\r\u000b\u000c\u0085\u2028\u2029]")
_ASTRAL = re.compile(r"[^\u0000-\uffff]")


def _tokens(text: str) -> Iterator[str]:
    """Tokens as the treebank has them, and "\n" for each end of a line."""
    place = 0
    while (place := _SPACES.match(text, place).end()) < len(text):
        if common := _COMMON.match(text, place) or _COMMON_BEFORE_STOP.match(text, place):
            yield common[0]
            place = common.end()
        elif text[place] == "\n":
            yield "\n"
            place += 1
        elif (longest := _longest(text, place)) is None:
            place += 1  # A character that it does not know.
        else:
            found, rule = longest
            place = found.end(1) - rule.given_back
            if rule.token:
                yield rule.token(text[found.start() : place])


def _longest(text: str, place: int) -> tuple[re.Match, _Rule] | None:
    """The match that reaches farthest, of equal ones the first, and its rule."""
    best = None
    for rule in _RULES:
        found = rule.pattern.match(text, place)
        if found and (best is None or found.end() > best[0].end()):
            best = found, rule
    return best


def _surrogates(found: re.Match) -> str:
    """A character beyond the basic plane as Java has it: two."""
    return "".join(map(chr, struct.unpack(">2H", found[0].encode("utf-16-be"))))


def tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Lower-case tokens of each caption, without punctuation.

    They equal pycocoevalcap's where captions are the lines of one text, as there, where the last word of one may depend
    on the first of the next ("plan B." before "The" has the token "b", before "the" the token "b."). Characters that
    end lines within a caption count as spaces; there they would give all captions behind them to other pictures. A
    token may hold non-breaking spaces ("1 1/2", "<a b>"), at which BLEU and CIDEr-D split it.
    """
    text = _ASTRAL.sub(_surrogates, "\n".join(_LINE_ENDS.sub(" ", caption) for caption in captions))
    lines: list[list[str]] = [[]]
    for token in _tokens(text):
        if token == "\n":
            lines.append([])
        else:
            lines[-1].append(token.encode("utf-16-be", "surrogatepass").decode("utf-16-be", "replace").lower())
    # The space of another kind at the end of an address that ends a caption is lost there.
    split = (" ".join(line).rstrip().split(" ") for line in lines)
    return [[token for token in line if token and token not in PUNCTUATION] for line in split] if captions else []

"""Scores of short answers about pictures: exact match, relaxed accuracy, accuracy by ten people.

Each takes one prediction and its reference answers and returns a number in [0, 1]; a dataset's
score is their mean.
"""

import itertools
import math
import re
from collections.abc import Sequence

_COUNTING = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(i) for i, word in enumerate(_COUNTING.split())} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
"""
# what one apostrophe less makes of each; the table of VQA has one row the wrong way round
_REPAIRS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTIONS.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the prediction is one of the answers but for case and white space at its ends."""
    return float(prediction.strip().lower() in {text.strip().lower() for text in answers})


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA's accuracy: numbers may be 5 % off (arXiv 2203.10244, section 5.1).

    The tolerance is of the answer's magnitude, its end included. "12%" is 0.12, here and there; a
    number with separators ("1,200") or a unit is none, and neither is an answer of 0, which has no
    magnitude: these are compared as texts, but for case, as in the scripts of pix2struct and Qwen.
    """
    return float(any(_is_near(prediction.strip(), text.strip(), tolerance) for text in answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy (arXiv 1904.08920), that of VQA (arXiv 1505.00468, section 3).

    A prediction is right when three people gave it, and a third less so with each that is
    missing: the mean over people of min(1, how many of the others gave it / 3), all after
    `normalise_answer`. Of ten, 1 agrees for 0.3, 2 for 0.6, 3 for 0.9 and 4 for 1.

    Raises:
      ValueError: fewer than four answers: of three others none could be right.
    """
    if len(answers) < 4:
        raise ValueError(
            f"{len(answers)} reference answers where this accuracy asks whether three others agree "
            "with each: TextVQA has ten a question; for few answers take exact match or ANLS"
        )
    said = normalise_answer(prediction)
    agree = sum(normalise_answer(text) == said for text in answers)
    # the `agree` people have one other fewer beside them
    others = agree * min(3, agree - 1) + (len(answers) - agree) * min(3, agree)
    return others / (3 * len(answers))


def normalise_answer(text: str) -> str:
    """An answer as VQA's evaluation server compares it.

    Lower case; no commas, question marks, articles, or full stops without a digit after them;
    number words to ten as digits; apostrophes put back into contractions. Other punctuation is
    dropped where some of its kind stands next to a space, else it becomes a space ("a-b" is two
    words, "a - b" too).
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = {b for a, b in itertools.pairwise(text) if a == " "}
    spaced |= {a for a, b in itertools.pairwise(text) if b == " "}
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if mark in spaced else " ")
    # the server passes a flag, 32, where the number of replacements goes
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_REPAIRS.get(word, word) for word in words if word not in _ARTICLES)


def _is_near(prediction: str, answer: str, tolerance: float) -> bool:
    said, told = _number(prediction), _number(answer)
    if said is None or not told:
        return prediction.lower() == answer.lower()
    return abs(said - told) / abs(told) <= tolerance


def _number(text: str) -> float | None:
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # "nan" and "inf" are words

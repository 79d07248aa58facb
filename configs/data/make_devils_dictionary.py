"""Makes devils_dictionary.jsonl, questions and answers, from Bierce's The Devil's Dictionary.

The text is the Internet Wiretap edition (1993) of the book of 1911, in the public domain, as the
Debian package dict-devil carries it: `python make_devils_dictionary.py FOLDER/devil.dict.dz`, with
the package's devil.index beside that file. Prose is kept and verse is not. This is satire of its
time: entries that insult peoples are left out by the list below, and nothing else is softened.
"""

import gzip
import json
import pathlib
import re
import string
import sys

MAX_WORDS = 120

QUESTIONS = (
    "Define {word}.",
    "What does '{word}' mean?",
    "What is the meaning of {word}?",
    "How would you define {word}?",
    "Give me a definition of {word}.",
    "Define: {word}",
)

LEFT_OUT = {
    "aboriginies": "mocks the killing of native peoples",
    "african": "a slur for Black people",
    "beard": "mocks the Chinese",
    "heathen": "an insult to Jews",
    "hebrew": "an insult to Jews",
    "houri": "an insult to Muslims",
    "impale": "mocks the Chinese",
    "indigestion": "mocks the speech of American Indians",
    "itch": "an insult to Scots",
    "joss-sticks": "an insult to the Chinese",
    "koran": "an insult to Muslims",
    "manna": "an insult to Jews",
    "minstrel": "a slur for Black people",
    "mulatto": "a slur for people of two races",
    "negro": "an insult to Black people",
    "photograph": "mocks American Indians",
    "pickaninny": "a slur for Black children",
    "pigmy": "mocks African peoples",
    "portuguese": "an insult to the Portuguese",
    "presentable": "mocks African peoples",
    "razor": "mocks Black and Chinese people",
    "red-skin": "a slur for American Indians",
    "repartee": "mocks American Indians",
    "russian": "an insult to Russians and Mongolians",
    "severalty": "mocks American Indians",
    "tope": "mocks Muslims and Hindus",
    "trichinosis": "mocks the dietary law of Jews",
    "ultimatum": "mocks the Turks",
    "zanzibari": "mocks African peoples",
    "zigzag": "speaks of the white man's burden",
}

# headwords that are written with a capital in the middle of a sentence
_NAMES = """Allah, April fool, Australia, Avernus, Baal, Bacchus, Benedictines, Berenice's hair,
Brahma, Caaba, Carmelite, Cartesian, Cerberus, Christian, Clio, Congress, Cremona, Cupid,
Decalogue, Druids, Elysium, Eucharist, Freemasons, Gnostics, Hades, Illuminati, Laocoon,
Magdalene, Malthusian, Mammon, Manicheism, Monday, Newtonian, Nirvana, November, Occident,
Olympian, Philistine, Phoenix, Platonic, Presbyterian, Pyrrhonism, Roundhead, Sabbath, Satan,
Trinity, un-American, Unitarian, Universalist, Wall Street, Washingtonian, Yankee, Zeus"""
NAMES = {name.lower(): name for name in re.split(r",\s+", _NAMES)}

_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])(?<!\bDr\.)(?<!\bMr\.)(?<!\bSt\.)(?<!\bJo\.)(?<!\b[A-Z]\.)|(?<=[.!?][\"')]))"
    r"\s+(?=[A-Z\"'(])"
)
_LEADS_ON = re.compile(
    r"\b[Ff]ollow(s|ing)\b|\bhere related\b|"
    r"^The account\b|[:;,]$|--$"
)


def read_entries(path: pathlib.Path) -> list[str]:
    """The entries of a dictd database, in order, as they are printed."""
    data, spans = gzip.decompress(path.read_bytes()), set()
    index = path.with_name(path.name.removesuffix(".dict.dz") + ".index")
    for line in index.read_text().splitlines():
        headword, start, size = line.split("\t")[:3]
        if not headword.startswith("00database"):
            spans.add((_number(start), _number(size)))
    return [data[start : start + size].decode() for start, size in sorted(spans)]


def _number(digits: str) -> int:
    """A number as dictd writes it, in base 64."""
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value


def prose_of(entry: str) -> tuple[list[str], bool]:
    """The paragraphs of an entry up to its first quotation; whether there is one.

    A block whose lines are all indented, or which ends in a name far to the right, is verse or a
    quotation; within prose an indented line begins a paragraph.
    """
    paragraphs: list[str] = []
    for block in re.split(r"\n[ \t]*\n", entry.strip("\n")):
        lines = block.split("\n")
        if all(line.startswith(" ") for line in lines) or lines[-1].startswith(" " * 9):
            return paragraphs, True
        paragraphs += [_join(part.split("\n")) for part in re.split(r"\n(?= )", block)]
    return paragraphs, False


def _join(lines: list[str]) -> str:
    text = ""
    for line in lines:
        divided = text.endswith("-") and not text.endswith("--")
        text += line.strip() if divided or not text else " " + line.strip()
    text = re.sub(r"\((?:See|Vide) [^)]*\)|[{}_]", "", text)
    return re.sub(r"\s+", " ", text).strip()


def answer_of(paragraphs: list[str], has_quotation: bool) -> str:
    """All paragraphs if they have at most MAX_WORDS words, else the first or its beginning.

    Sentences that announce what is left out, and quotations without an end, are left out too.
    """
    if sum(len(text.split()) for text in paragraphs) > MAX_WORDS:
        paragraphs, has_quotation = [_beginning(paragraphs[0])], True
    *kept, last = paragraphs
    sentences = _SENTENCE_END.split(last)
    while has_quotation and sentences and not _is_end(sentences):
        sentences.pop()
    return "\n\n".join(filter(None, [*kept, " ".join(sentences)]))


def _is_end(sentences: list[str]) -> bool:
    return not _LEADS_ON.search(sentences[-1]) and " ".join(sentences).count('"') % 2 == 0


def _beginning(paragraph: str) -> str:
    """Its first sentences, of at most MAX_WORDS words together."""
    kept = ""
    for sentence in _SENTENCE_END.split(paragraph):
        longer = f"{kept} {sentence}".strip()
        if len(longer.split()) > MAX_WORDS:
            break
        kept = longer
    return kept


def headword_of(entry: str) -> str:
    """The word that an entry defines, as one writes it in a sentence."""
    head = re.match(r"[A-Z][A-Z.'-]*(?: [A-Z][A-Z'-]+)*", entry)[0]
    if re.fullmatch(r"(?:[A-Z]\.)+|LL\.D\.|[A-Z]", head):
        return head
    word = head.rstrip(".").lower().replace("tzetze", "tzetze fly")
    return NAMES.get(word, word)


def says_something(answer: str) -> bool:
    """Whether there is more than the headword and what part of speech it is."""
    return bool(
        re.search(r"[a-z]", re.sub(r"\b(?:n|v|t|i|adj|adv|pp|pl|pro|pron|x)\.", "", answer))
    )


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER/devil.dict.dz")
    answers: dict[str, str] = {}
    for entry in read_entries(pathlib.Path(sys.argv[1])):
        word, answer = headword_of(entry), answer_of(*prose_of(entry))
        if word.lower() in LEFT_OUT or not says_something(answer) or answer in answers.values():
            continue
        answers[f"{word} (2)" if word in answers else word] = answer
    target = pathlib.Path(__file__).with_name("devils_dictionary.jsonl")
    with target.open("w", encoding="utf-8", newline="\n") as file:
        for number, (key, answer) in enumerate(answers.items()):
            question = QUESTIONS[number % len(QUESTIONS)].format(word=key.removesuffix(" (2)"))
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"id": key, "messages": messages}, ensure_ascii=False) + "\n")
    print(f"{len(answers)} entries written to {target}")


if __name__ == "__main__":
    main()

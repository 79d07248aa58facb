"""What `document_study` ends with: a table, numbers, pages with their answers."""

import collections
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.seeing.documents import Library, question
from experiments.seeing.pictures import Answered, answer_sheet
from experiments.study.report import table, write_numbers
from llmprep_jax import cli
from llmprep_jax.evaluate.page import Example, write_page

Answers = Mapping[str, Sequence[str]]  # by who gave them


def write_answers(
    cfg: Any,
    library: Library,
    records: Sequence[dict],
    answers: Answers,
    scores: Mapping[str, Sequence[float]],
    costs: dict[str, Any],
) -> cli.Outputs:
    """Writes documents.json, documents.md, answers.png and worst.html."""
    means = {way: statistics.mean(values) for way, values in scores.items()}
    exact = {way: statistics.mean(x == 1 for x in values) for way, values in scores.items()}
    groups = _groups(records)
    by_group = {
        f"{kind}, {language}": {
            "questions": len(places),
            **{way: statistics.mean(values[i] for i in places) for way, values in scores.items()},
        }
        for (kind, language), places in groups.items()
    }
    asked = [
        {
            "page": record["id"],
            "question": question(record),
            "answers": record["answers"],
            "said": {way: said[i] for way, said in answers.items()},
        }
        for i, record in enumerate(records)
    ]
    numbers = {"anls": means, "exact": exact, "by_group": by_group, **costs, "asked": asked}
    write_numbers(cfg.out / "documents.json", cfg, numbers)
    rows = [
        [name, str(of["questions"]), *(f"{of[way]:.3f}" for way in scores)]
        for name, of in sorted(by_group.items())
    ]
    rows += [["all", str(len(records)), *(f"{mean:.3f}" for mean in means.values())]]
    rows += [["all, exact", str(len(records)), *(f"{share:.3f}" for share in exact.values())]]
    (cfg.out / "documents.md").write_text(table(["pages", "questions", *scores], rows))
    sheet = answer_sheet(
        pages_of(library, records, answers, scores),
        title="Questions to pages that were held out",
        language="zh-Hans" if any(x["language"] != "en" for x in records) else "en",
    )
    sheet.drawn().save(cfg.out / "answers.png")
    _write_worst(cfg, library, records, answers, scores)
    names = {"table": "documents.md", "numbers": "documents.json", "pages": "answers.png"}
    return {name: cfg.out / file for name, file in {**names, "worst": "worst.html"}.items()}


def _groups(records: Sequence[dict]) -> dict[tuple[str, str], list[int]]:
    groups = collections.defaultdict(list)
    for place, record in enumerate(records):
        groups[record["kind"], record["language"]].append(place)
    return groups


def pages_of(
    library: Library,
    records: Sequence[dict],
    answers: Answers,
    scores: Mapping[str, Sequence[float]],
    count: int = 8,
) -> list[tuple[Any, list[Answered]]]:
    """Pages of each kind and language in turn, with all that was asked of them."""
    by_page = collections.defaultdict(list)
    for place, record in enumerate(records):
        by_page[record["id"]].append(place)
    turns: dict[tuple[str, str], int] = collections.Counter()
    chosen = []
    for places in by_page.values():
        record = records[places[0]]
        group = record["kind"], record["language"]
        chosen.append((turns[group], group, places))
        turns[group] += 1
    return [
        (
            library.page(records[places[0]]),
            [
                Answered(
                    question(records[i]),
                    records[i]["answers"][0],
                    {way: (said[i], scores[way][i] == 1) for way, said in answers.items()},
                    [tuple(box) for box in records[i]["boxes"]],
                )
                for i in places
            ],
        )
        for _, _, places in sorted(chosen)[:count]
    ]


def _write_worst(
    cfg: Any,
    library: Library,
    records: Sequence[dict],
    answers: Answers,
    scores: Mapping[str, Sequence[float]],
) -> None:
    """The page of what the tuned model answered worst; it is the second of those that answer."""
    way = list(answers)[1]
    examples = [
        Example(
            question=question(record),
            answers=record["answers"],
            prediction=said,
            score=score,
            images=[library.page(record)],
            category=(record["kind"], record["language"]),
            name=f"page {record['id']}",
        )
        for record, said, score in zip(records, answers[way], scores[way], strict=True)
    ]
    write_page(cfg.out / "worst.html", examples, title=f"What {way} answered worst")

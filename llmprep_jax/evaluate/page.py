"""A page of the questions that a model answered worst, with their pictures.

One HTML file that needs nothing else: pictures are small JPEGs within it, there are no scripts, and
all text is escaped, since predictions, questions and file names are anybody's.
"""

import base64
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from llmprep_jax.data.refs import Ref
from llmprep_jax.evaluate.tasks import Report
from llmprep_jax.remote import AnyPath, write_text
from llmprep_jax.vision.open import open_rgb

_SIDE = 640  # pixels of a picture's longer side
_MOST = 1000  # characters of one text; a model that repeats itself writes thousands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """A question about pictures and what a model said.

    Attributes:
      images: files, Pillow images, arrays: what `vision.open_image` takes; or `data.refs.Ref`s.
      score: in [0, 1].
      name: where it is from, as "line 12 of test.jsonl"; None: its number is shown.
    """

    question: str
    answers: Sequence[str]
    prediction: str
    score: float
    images: Sequence[Any] = ()
    category: str | Sequence[str] | None = None
    name: str | None = None


def write_page(
    path: AnyPath,
    examples: Sequence[Example],
    *,
    title: str,
    report: Report | None = None,
    facts: Mapping[str, object] | None = None,
    count: int = 40,
) -> None:
    """Writes the page of the `count` lowest scores; arguments as of `render`."""
    write_text(path, render(examples, title=title, report=report, facts=facts, count=count))


def render(
    examples: Sequence[Example],
    *,
    title: str,
    report: Report | None = None,
    facts: Mapping[str, object] | None = None,
    count: int = 40,
) -> str:
    """The page as HTML, lowest score first, equal ones in the order of the data.

    A picture that cannot be read is named in its place, with the reason.

    Args:
      report: shown above as a table of splits.
      facts: names and values shown above, as the model and the data.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].score)[:count]
    cases = [_case(i, examples[i]) for i in order]
    return _TEMPLATE.render(
        title=title, report=report, facts=facts or {}, cases=cases, total=len(examples)
    )


def thumbnail(image: Any, side: int = _SIDE) -> str:
    """What `vision.open_image` takes, at most `side` pixels wide and high, as a data URI.

    Raises as `vision.open_image`.
    """
    small = open_rgb(image).copy()  # may be the caller's own
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=85, subsampling=0)  # full colour: red print stays legible
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _case(number: int, example: Example) -> dict[str, object]:
    """What the template shows of an example."""
    categories = example.category or ()
    categories = [categories] if isinstance(categories, str) else list(categories)
    return {
        "name": example.name or f"question {number}",
        "score": example.score,
        "verdict": "right" if example.score >= 1 else "partly" if example.score > 0 else "wrong",
        "categories": categories,
        "pictures": [_picture(image) for image in example.images],
        "question": _cut(example.question),
        "answers": [_cut(answer) for answer in example.answers],
        "prediction": _cut(example.prediction),
    }


def _picture(image: Any) -> dict[str, str]:
    is_path = isinstance(image, str | os.PathLike)
    name = os.path.basename(os.fspath(image)) if is_path else "picture"
    name = os.path.basename(image.title) if isinstance(image, Ref) else name
    try:
        content = image.content() if isinstance(image, Ref) else image
        return {"name": name, "uri": thumbnail(content)}
    except (OSError, ValueError, ImportError) as error:
        return {"name": name, "fault": f"not shown: {error}"}


def _cut(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written
    if len(text) <= _MOST:
        return text
    return f"{text[:_MOST]} … ({len(text):,} characters)"


_TEMPLATE = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
).from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1rem; margin: 0; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
article { border: 1px solid var(--line); border-radius: 8px; margin: 1.5rem 0; overflow: hidden; }
header { display: flex; flex-wrap: wrap; gap: .75rem; padding: .5rem 1rem; align-items: center;
 background: var(--soft); }
.score { color: #fff; border-radius: 4px; padding: 0 .5rem; font-variant-numeric: tabular-nums; }
.wrong { background: #b3261e; } .partly { background: #946200; } .right { background: #1b6e3c; }
.content { display: flex; flex-wrap: wrap; gap: 1rem; padding: 1rem; }
.pictures { flex: 1 1 20rem; } .texts { flex: 1 1 20rem; margin: 0; min-width: 0; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); background: #fff; }
dt { font-size: .85rem; opacity: .75; } dd { margin: 0 0 .75rem; white-space: pre-wrap;
 overflow-wrap: anywhere; }
.none { opacity: .6; font-style: italic; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% if facts %}
<table>
{% for name, value in facts.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if report %}
<table>
<tr><th scope="col">split</th><th scope="col">questions</th><th scope="col">score</th></tr>
{% for name, split in report.by_split.items() %}
<tr><td>{{ name }}</td><td class="number">{{ split.count }}</td>
<td class="number">{{ "%.4f" | format(split.score) }}</td></tr>
{% endfor %}
<tr><th scope="row">all</th><td class="number">{{ report.per_example | length }}</td>
<td class="number">{{ "%.4f" | format(report.overall) }}</td></tr>
</table>
{% endif %}
<p>{{ cases | length }} of {{ total }} questions, lowest score first.</p>
{% for case in cases %}
<article>
<header><span class="score {{ case.verdict }}">{{ "%.3f" | format(case.score) }}</span>
<h2>{{ case.name }}</h2>
{% for category in case.categories %}
<span>{{ category }}</span>
{% endfor %}
</header>
<div class="content">
<div class="pictures">
{% for picture in case.pictures %}
{% if picture.uri is defined %}
<img src="{{ picture.uri }}" alt="{{ picture.name }}">
{% else %}
<p class="none">{{ picture.fault }}</p>
{% endif %}
{% endfor %}
</div>
<dl class="texts">
<dt>Question</dt><dd dir="auto">{{ case.question }}</dd>
<dt>Answers</dt>
{% for answer in case.answers %}
<dd dir="auto" class="answer">{{ answer }}</dd>
{% endfor %}
<dt>Prediction</dt>
{% if case.prediction %}
<dd dir="auto" class="prediction">{{ case.prediction }}</dd>
{% else %}
<dd class="prediction none">(nothing)</dd>
{% endif %}
</dl>
</div>
</article>
{% endfor %}
</main>
</body>
</html>
""")

"""Config files, overrides and their round trip; the reader is fuzzed: it answers or raises
UsageError."""

import contextlib
import dataclasses
import io
import json
import pathlib
from typing import Any, ClassVar, Literal

import hypothesis
import pytest
import rich.console
from hypothesis import strategies as st

import llmprep_jax as lp
from llmprep_jax.config import (
    UsageError,
    changed_fields,
    from_dict,
    load_config,
    override,
    print_config,
    settle,
    split_arguments,
    to_dict,
    to_json,
)


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["cosine", "wsd"] = "cosine"
    clip: float | None = 1.0


@dataclasses.dataclass(frozen=True)
class LoRA:
    rank: int = 8
    targets: str | tuple[str, ...] = "all-linear"


@dataclasses.dataclass(frozen=True)
class DoRA:
    rank: int = 8
    magnitude: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Heads:
    num_heads: int = 4
    num_kv_heads: int = 2

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not divide by {self.num_kv_heads}")


@dataclasses.dataclass(frozen=True)
class Run:
    steps: int = 10
    name: str | None = None
    out: pathlib.Path = pathlib.Path("runs/x")
    debug: bool = False
    optim: Optim = Optim()
    heads: Heads = Heads()
    adapter: LoRA | DoRA | None = None
    sources: tuple[Source, ...] = (Source("a.txt"),)
    source: Source = Source("a.txt")
    held_out: Source | None = dataclasses.field(default=None, metadata={"like": "source"})
    model: Any = None
    sizes: tuple[int, ...] = ()


def set_one(text: str) -> Run:
    return override(Run(), [text])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("steps=1_000", "steps", 1000),
        ("steps=1e4", "steps", 10_000),
        ("name=none", "name", None),
        ("name='none'", "name", "none"),
        ("name=a=b", "name", "a=b"),
        ("out=runs/y", "out", pathlib.Path("runs/y")),
        ("debug=True", "debug", True),
        ("sizes=1,2,3", "sizes", (1, 2, 3)),
        ("sizes=(4,)", "sizes", (4,)),
        ("sizes=[]", "sizes", ()),
        ("optim.lr=3e-4", "optim", Optim(lr=3e-4)),
        ("optim.lr=1", "optim", Optim(lr=1.0)),
        ("optim.betas=0.8,0.9", "optim", Optim(betas=(0.8, 0.9))),
        ("optim.schedule=wsd", "optim", Optim(schedule="wsd")),
        ("optim.clip=None", "optim", Optim(clip=None)),
        ("sources.0.weight=2", "sources", (Source("a.txt", 2.0),)),
        ("adapter.targets=q,v", "adapter", LoRA(targets=("q", "v"))),
        ("adapter.targets=all-linear", "adapter", LoRA(targets="all-linear")),
        ("adapter.targets='a,b'", "adapter", LoRA(targets="a,b")),
        ("adapter.rank=4", "adapter", LoRA(rank=4)),
        ("adapter.magnitude=false", "adapter", DoRA(magnitude=False)),
        ("adapter=DoRA", "adapter", DoRA()),
        ("held_out.path=b.txt", "held_out", Source("b.txt")),
        ("held_out.weight=2", "held_out", Source("a.txt", 2.0)),
        ("model=some/folder", "model", "some/folder"),
    ],
)
def test_an_override_is_read_by_the_declared_type(text, key, value):
    new = set_one(text)
    assert getattr(new, key) == value
    assert type(getattr(new, key)) is type(value)
    assert dataclasses.replace(new, **{key: getattr(Run(), key)}) == Run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz=1", "unknown key stepz; did you mean steps?"),
        ("optim.learning_rat=1", "unknown key optim.learning_rat; did you mean optim.lr?"),
        ("optim.schedul=wsd", "did you mean optim.schedule?"),
        ("steps=1.5", "steps=1.5: wanted a whole number"),
        ("steps=ten", "wanted a whole number"),
        ("steps=none", "wanted a whole number"),
        ("debug=1", "wanted true or false"),
        ("out=", "out=: wanted a path"),
        ("out=''", "wanted a path"),
        ("optim.lr=nan", "wanted a number"),
        ("optim.lr=1e999", "wanted a number"),
        ("optim.lr=fast", "optim.lr=fast: wanted a number"),
        ("optim.betas=0.9", "wanted a list of a number, a number"),
        ("optim.schedule=linear", "wanted cosine or wsd"),
        ("optim=1", "wanted Optim"),
        ("optim.lr.x=1", "optim.lr is 0.001, no section"),
        ("name.x=1", "name is None, no section"),
        ("adapter.rang=4", "did you mean adapter.rank?"),
        ("adapter.zzz=4", "unknown key adapter.zzz; the keys are rank, targets, magnitude"),
        ("learning_rate=1", "unknown key learning_rate; did you mean optim.lr?"),
        ("lr=1", "unknown key lr; did you mean optim.lr?"),
        ("lora_r=1", "unknown key lora_r; did you mean adapter.rank?"),
        ("heads.rank=1", "unknown key heads.rank; did you mean adapter.rank?"),
        ("qqq=1", "unknown key qqq; the keys are steps, name, out"),
        ("adapter._type=DORA", "adapter._type=DORA; the classes are LoRA, DoRA"),
        ("steps._type=LoRA", "steps._type=LoRA; the classes are none, it is no section"),
        ("sources.1.weight=1", "sources has 1 items"),
        ("sources.-1.weight=1", "sources has 1 items"),
        ("heads.num_kv_heads=3", "heads.num_kv_heads: 4 heads do not divide by 3"),
        ("steps", "'steps' is no setting"),
        ("=1", "is no setting"),
        ("out=a\0b", "wanted a path"),
    ],
)
def test_a_bad_override_is_a_usage_error_in_one_line(text, message):
    with pytest.raises(UsageError) as error:
        set_one(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_changes_that_need_each_other_are_made_at_once():
    new = override(Run(), ["heads.num_heads=9", "heads.num_kv_heads=3"])
    assert new.heads == Heads(9, 3)


def test_the_last_setting_of_a_key_wins():
    assert override(Run(), ["steps=1", "steps=2"]).steps == 2


@pytest.mark.parametrize("texts", [["adapter=none", "adapter.rank=1"], ["a.b=1", "a=1"]])
def test_a_section_is_not_set_as_a_whole_and_in_part(texts):
    with pytest.raises(UsageError, match="as a whole and in part"):
        override(Run(), texts)


@pytest.mark.parametrize(
    "texts", [["adapter=DoRA", "adapter.rank=4"], ["adapter.rank=4", "adapter=DoRA"]]
)
def test_a_section_is_chosen_by_its_class_and_changed_at_once(texts):
    assert override(Run(), texts).adapter == DoRA(rank=4)


@dataclasses.dataclass(frozen=True)
class Named:
    SET_BY: ClassVar[str] = "name"

    name: str = "none"
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class HasNamed:
    task: Named = dataclasses.field(default_factory=Named)


@pytest.mark.parametrize(
    "texts",
    [["task=x", "task.limit=4"], ["task.limit=4", "task=x"], ["task.name=x", "task.limit=4"]],
)
def test_a_section_that_is_set_as_a_whole_sets_the_field_it_says(texts):
    assert override(HasNamed(), texts).task == Named("x", 4)
    assert override(HasNamed(), texts[:1]) != HasNamed()
    with pytest.raises(UsageError, match="unknown key task.limits; did you mean task.limit?"):
        override(HasNamed(), ["task=x", "task.limits=4"])


def test_what_an_override_replaces_is_never_looked_up(tmp_path):
    body = """
def find():
    raise FileNotFoundError("not installed")

def get_config():
    return Run(name=find)
"""
    path = write(tmp_path, body)
    assert load_config(path, ["name=here"]).name == "here"
    with pytest.raises(FileNotFoundError, match="not installed"):
        load_config(path)


def test_a_section_can_be_switched_off():
    run = dataclasses.replace(Run(), adapter=LoRA())
    assert override(run, ["adapter=none"]).adapter is None


def test_arguments_part_into_positions_and_overrides():
    split = split_arguments(["configs/a.py", "optim.lr=1", "x y=1", "a/b=c", "sources.0.path=p"])
    assert split == (["configs/a.py", "x y=1", "a/b=c"], ["optim.lr=1", "sources.0.path=p"])
    with pytest.raises(UsageError, match="--lr"):
        split_arguments(["--lr=1"])


def write(folder: pathlib.Path, body: str) -> pathlib.Path:
    path = folder / "tiny.py"
    path.write_text("from tests.test_config import Run, Optim\nimport dataclasses\n" + body)
    return path


def test_a_config_file_is_run_and_overridden(tmp_path):
    path = write(tmp_path, "def get_config():\n    return Run(steps=3)\n")
    run = load_config(path, ["optim.lr=0.5"])
    assert (run.steps, run.optim.lr) == (3, 0.5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "defines no function get_config()"),
        ("def get_config():\n    return 3\n", "returned a int, no dataclass"),
        ("def get_config(:\n", "tiny.py:3: SyntaxError"),
        ("def get_config():\n    return Run(step=1)\n", "tiny.py:4: TypeError"),
        ("def get_config():\n    return Run(steps='3')\n", "steps: wanted a whole number, not '3'"),
        (
            "def get_config():\n    return Run(optim=Optim(clip='a'))\n",
            "optim.clip: wanted a number or none",
        ),
    ],
)
def test_a_bad_config_file_is_a_usage_error_in_one_line(tmp_path, body, message):
    with pytest.raises(UsageError) as error:
        load_config(write(tmp_path, body))
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0


def test_a_missing_config_file_names_its_siblings(tmp_path):
    write(tmp_path, "")
    with pytest.raises(UsageError, match=r"did you mean tiny\.py"):
        load_config(tmp_path / "tyny.py")
    with pytest.raises(UsageError, match=r"there are tiny\.py"):
        load_config(tmp_path / "qqq.py")
    with pytest.raises(UsageError, match="there is no folder"):
        load_config(tmp_path / "none" / "tiny.py")
    with pytest.raises(UsageError, match="no config file"):
        load_config("a\0b")


def test_a_saved_config_comes_back_equal():
    run = override(Run(), ["adapter.magnitude=true", "sizes=1,2", "name=n", "optim.clip=none"])
    assert from_dict(Run, json.loads(to_json(run))) == run
    with pytest.raises(UsageError, match=r"unknown key Run\.stepz"):
        from_dict(Run, {**to_dict(run), "stepz": 1})
    with pytest.raises(UsageError, match="Foo is saved"):
        from_dict(Run, {**to_dict(run), "_type": "Foo"})


def test_changes_between_saved_configs_are_listed_by_key():
    old, new = to_dict(Run()), to_dict(override(Run(), ["optim.lr=1", "steps=3"]))
    assert list(changed_fields(old, new)) == [("steps", 10, 3), ("optim.lr", 1e-3, 1.0)]


def test_the_config_prints_what_differs_from_the_defaults():
    out = io.StringIO()
    run = override(Run(), ["optim.lr=0.5", "adapter.rank=4", "sizes=1,2", "name=long name"])
    print_config(run, rich.console.Console(file=out, width=30))
    assert out.getvalue().splitlines() == [
        "name = long name",
        "optim.lr = 0.5",
        "adapter = LoRA",
        "adapter.rank = 4",
        "sizes = (1, 2)",
    ]
    out = io.StringIO()
    print_config(Run(), rich.console.Console(file=out))
    assert out.getvalue() == ""


@dataclasses.dataclass(frozen=True)
class Settled:
    out: pathlib.Path
    steps: int = 1
    rate: float = 1.0
    sizes: tuple[int, ...] = ()
    name: str | None = None

    def __post_init__(self):
        settle(self)


def test_fields_given_in_python_are_converted_or_refused_by_name():
    assert Settled("a/b", rate=2, sizes=[1]) == Settled(pathlib.Path("a/b"), 1, 2.0, (1,))
    with pytest.raises(UsageError, match=r"^Settled\.steps: wanted a whole number, not 'six'$"):
        Settled("a", steps="six")
    with pytest.raises(UsageError, match=r"^Settled\.out: wanted a path, not 3$"):
        Settled(3)


KEYS = [
    "steps",
    "optim",
    "optim.lr",
    "optim.betas",
    "heads.num_heads",
    "adapter.rank",
    "sizes",
    "out",
]
KEYS += ["sources.0.path", "sources.9", "model.x", "", ".", "name", "debug", "adapter"]
texts = st.text(st.characters(codec=None), max_size=20)


@hypothesis.given(st.lists(st.tuples(st.sampled_from(KEYS) | texts, texts), max_size=4))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_override_gives_a_config_that_saves_or_a_usage_error(pairs):
    run = Run()
    with contextlib.suppress(UsageError):
        run = override(Run(), [f"{key}={value}" for key, value in pairs])
    assert from_dict(Run, json.loads(to_json(run))) == run


finite = st.floats(allow_nan=False, allow_infinity=False)  # JSON has no others
leaves = st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5)
NAMES = ["_type", "steps", "optim", "lr", "betas", "sources", "path", "sizes", "adapter", "Run"]
saved = st.recursive(
    leaves | st.sampled_from(["Run", "Optim", "LoRA", "Source"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=8,
)


@hypothesis.given(st.dictionaries(st.sampled_from([*to_dict(Run()), "stepz"]), saved, max_size=3))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_saved_config_is_read_or_refused_in_one_line(changes):
    try:
        run = from_dict(Run, to_dict(Run()) | changes)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 most examples raise, some do not
    else:
        assert from_dict(Run, json.loads(to_json(run))) == run


@hypothesis.given(body=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@hypothesis.settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_bytes_for_a_config_file_are_a_usage_error(tmp_path, body):
    path = tmp_path / "fuzz.py"
    path.write_bytes(body)
    with pytest.raises(UsageError) as error:
        load_config(path)
    assert "\n" not in str(error.value)


@hypothesis.given(
    st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.text()
)
@hypothesis.settings(deadline=None)
def test_a_value_survives_being_written_as_an_override(lr, steps, debug, name):
    hypothesis.assume("\0" not in name)
    new = override(
        Run(), [f"optim.lr={lr!r}", f"steps={steps}", f"debug={debug}", f"name='{name}'"]
    )
    assert (new.optim.lr, new.steps, new.debug, new.name) == (lr, steps, debug, name)


def test_a_section_may_change_its_class_and_keeps_what_both_have():
    run = override(Run(), ["adapter._type=DoRA", "adapter.rank=4"])
    assert run.adapter == DoRA(rank=4)
    assert override(run, ["adapter._type=LoRA"]).adapter == LoRA(rank=4)


@pytest.mark.parametrize("method", [lp.peft.LoRA, lp.peft.DoRA, lp.peft.LoHa, lp.peft.IA3])
def test_the_adapter_of_a_run_survives_its_file(method):
    settings = method(targets=("q", "v"))
    saved = json.loads(to_json(settings))
    assert from_dict(lp.peft.AnyMethod, saved) == settings

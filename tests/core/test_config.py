"""config.py against the written precedence (default < recipe < command line) and tomllib, the standard's own reader."""

import math
import re
import tomllib
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core import cli
from core.config import check_limits, merge, quote_key, read_toml, setting, to_toml


@dataclass
class Source:
    path: str = ""
    role: Literal["domain", "general"] = "domain"
    weight: float = 1.0


@dataclass
class Inner:
    depth: int = 3


@dataclass
class Data:
    context: int = 2048
    """tokens in a row"""
    packed: bool = False
    names: tuple[str, ...] = ()
    prompts: list[str] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self):
        if self.context < 1:
            raise ValueError(f"data.context is {self.context}, but must be above 0")


@dataclass
class Config:
    out: str = "out/run"
    lr: float = 1e-5
    steps: int | None = None
    warm: bool = True
    data: Data = field(default_factory=Data)


@pytest.fixture
def recipe(tmp_path):
    """recipe(text) -> path of a file that holds it."""
    def write(text: str) -> str:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)
    return write


def parse(cls, argv, description=""):
    return cli.parse(cls, argv, "train.py", description, recipe=True)


def one_line(message) -> str:
    assert "\n" not in str(message.value)
    assert "╭" not in str(message.value)
    return str(message.value)


# ---- where a value comes from

def test_precedence(recipe):
    path = recipe('lr = 3e-4\nsteps = 7\n[data]\ncontext = 512\n[data.sources.legal]\npath = "a"\nweight = 2\n')
    assert parse(Config, []) == Config()
    file = parse(Config, [path])
    assert (file.out, file.lr, file.steps, file.data.context) == ("out/run", 3e-4, 7, 512)
    assert file.data.sources == {"legal": Source("a", "domain", 2.0)}
    assert type(file.data.sources["legal"].weight) is float
    line = parse(Config, [path, "--lr", "1e-3", "--data.sources.legal.path", "b", "--steps=9"])
    assert (line.lr, line.steps, line.data.context) == (1e-3, 9, 512)
    assert line.data.sources == {"legal": Source("b", "domain", 2.0)}
    assert parse(Config, []) == Config()                       # nothing of it stayed in the defaults
    assert Config().data.sources == {}


@pytest.mark.parametrize(("argv", "attribute", "value"), [
    (["--data.packed"], "packed", True),
    (["--data.packed", "True"], "packed", True),
    (["--data.packed", "true"], "packed", True),
    (["--data.packed=true"], "packed", True),
    (["--data.packed", "--data.context", "4"], "packed", True),
    (["--data.packed", "false"], "packed", False),
    (["--data.names", "a", "b"], "names", ("a", "b")),
    (["--data.names"], "names", ()),
    (["--data.prompts", "Once upon a time,", "ü\n"], "prompts", ["Once upon a time,", "ü\n"]),
    (["--data.context=7"], "context", 7),
    (["--data.inner.depth", "5"], "inner", Inner(5)),
])
def test_command_line_values(argv, attribute, value):
    assert getattr(parse(Config, argv).data, attribute) == value


def test_flags_and_words():
    """`true` is a truth value after a switch and a word everywhere else; a dash is as good as an underscore."""
    assert parse(Config, ["--warm", "false"]).warm is False
    assert parse(Config, ["--out", "true"]).out == "true"
    assert parse(Config, ["--data.packed", "--out", "false"]).out == "false"
    assert parse(Config, ["--steps", "None"]).steps is None
    assert parse(Config, ["--lr", "-1"]).lr == -1.0


def test_new_sections_open_on_the_command_line(recipe):
    argv = ["--data.sources.NEW.path", "x", "--data.sources.NEW.role", "general", "--data.sources.other.weight", "3"]
    assert parse(Config, argv).data.sources == {"NEW": Source("x", "general"), "other": Source(weight=3.0)}
    both = parse(Config, [recipe('[data.sources.old]\npath = "o"\n'), *argv]).data.sources
    assert both == {"old": Source("o"), "NEW": Source("x", "general"), "other": Source(weight=3.0)}


NAMES = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(st.lists(NAMES, min_size=2, max_size=4, unique=True), st.booleans())
@example(["pubmed-abstracts", "pubmed_abstracts", "n0", "NAME"], True)
@example(["", ".", "a.path", "a=b", '"a"', "'", "-", "--out", "true"], False)
def test_every_key_of_toml_is_a_name_that_a_flag_finds(tmp_path_factory, names, equals):
    """Truth: tomllib, and what the recipe says of a source; a flag changes its one setting and no other source."""
    path = tmp_path_factory.mktemp("names") / "recipe.toml"
    config = Config(data=Data(sources={name: Source(f"p{i}", "general", 2.0) for i, name in enumerate(names[:-1])}))
    path.write_text(to_toml(config), encoding="utf-8")
    assert list(tomllib.loads(path.read_text(encoding="utf-8"))["data"]["sources"]) == names[:-1]
    words = []
    for name in names[1:]:
        # A name stands as it is, or quoted where it holds what would end it.
        plain = name if "=" not in name and name[:1] not in ('"', "'") else quote_key(name)
        for key, value in (("weight", "5"), ("path", "-new=x.y")):
            option = f"--data.sources.{plain if key == 'path' else quote_key(name)}.{key}"
            words += [f"{option}={value}"] if equals else [option, value]
    got = parse(Config, [str(path), *words])
    assert got.data.sources == {name: Source("-new=x.y" if i else "p0", "general" if i < len(names) - 1 else "domain",
                                             5.0 if i else 2.0) for i, name in enumerate(names)}
    assert list(got.data.sources) == names
    path.write_text(to_toml(got), encoding="utf-8")
    assert parse(Config, [str(path)]) == got


def test_messages_name_a_source_as_the_user_does(recipe):
    path = recipe('[data.sources."a.b"]\n[data.sources.c-d]\n')
    for word, value, message in (
            ("a.b.pth", "1", 'unknown key data.sources."a.b".pth; did you mean data.sources."a.b".path?'),
            ("c-d.role", "bad", "invalid choice 'bad' for argument '--data.sources.c-d.role'. Expected one of "
                                "('domain', 'general')."),
            ("new-one.weight", "x", "--data.sources.new-one.weight: 'x' is no FLOAT")):
        with pytest.raises(ValueError) as error:
            parse(Config, [path, f"--data.sources.{word}", value])
        assert one_line(error) == message


def test_help_shows_what_a_named_section_holds(recipe, capsys):
    for argv in ([], [recipe('[data.sources.a-b]\nrole = "general"\n')]):
        with pytest.raises(SystemExit):
            parse(Config, [*argv, "--help"])
        shown = capsys.readouterr().out
        assert "data.sources.NAME options:" in shown
        assert "--data.sources.NAME.role {domain,general}\n" in shown


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbflr = 2.0\r\n")
    assert parse(Config, [str(tmp_path / "r.toml")]).lr == 2.0


# ---- mistakes

@pytest.mark.parametrize(("text", "message"), [
    ("lrr = 1\n", "unknown key lrr; did you mean lr?"),
    ("[data]\ncontxt = 1\n", "unknown key data.contxt; did you mean data.context?"),
    ("[dta]\ncontext = 1\n", "unknown key dta; did you mean data?"),
    ("[data.sources.a]\npth = 'x'\n", "unknown key data.sources.a.pth; did you mean data.sources.NAME.path?"),
    ("zzzzzz = 1\n", "unknown key zzzzzz"),
    ("[data]\ncontext = '1'\n", "data.context is '1', but must be of type int"),
    ("[data]\ncontext = 1.5\n", "data.context is 1.5, but must be of type int"),
    ("[data]\ncontext = true\n", "data.context is True, but must be of type int"),
    ("lr = true\n", "lr is True, but must be of type float"),
    ("steps = true\n", "steps is True, but must be of type int"),
    ("[data]\npacked = 1\n", "data.packed is 1, but must be of type bool"),
    ("steps = 'x'\n", "steps is 'x', but must be of type int"),
    ("data = 3\n", "data is a section, but its value is 3"),
    ("[data]\nsources = 3\n", "data.sources is a table of named sections, but its value is 3"),
    ("[data.sources]\na = 3\n", "data.sources.a is a section, but its value is 3"),
    ("[data.sources.a]\nrole = 'bad'\n", "data.sources.a.role is 'bad', but must be one of domain, general"),
    ("[data]\nnames = [1]\n", "data.names is 1, but must be of type str"),
])
def test_mistakes_in_a_recipe(recipe, text, message):
    with pytest.raises(ValueError) as error:
        parse(Config, [recipe(text)])
    assert one_line(error) == message


@dataclass
class Limited:
    weight: float = setting(1.0, at_least=0)
    shares: list[float] = setting([0.5], at_most=1)


@dataclass
class Table:
    inner: Limited = field(default_factory=Limited)
    sources: dict[str, Limited] = field(default_factory=dict)


@pytest.mark.parametrize(("table", "message"), [
    (Table(Limited(-1.0)), "data.inner.weight is -1.0, but must be at least 0"),
    (Table(Limited(float("nan"))), "data.inner.weight is nan, but must be at least 0"),
    (Table(Limited(shares=[0.1, 1.5])), "data.inner.shares is 1.5, but must be at most 1"),
    (Table(sources={"a": Limited(), "b": Limited(-0.5)}), "data.sources.b.weight is -0.5, but must be at least 0"),
])
def test_limits_hold_in_sections_lists_and_tables(table, message):
    with pytest.raises(ValueError) as error:
        check_limits(table, "data.")
    assert str(error.value) == message
    check_limits(Table(Limited(0.0), {"a": Limited(0.0, [1.0, None])}), "data.")


@pytest.mark.parametrize(("argv", "message"), [
    (["--lrr", "1"], "unknown key lrr; did you mean lr?"),
    (["--data.contxt", "1"], "unknown key data.contxt; did you mean data.context?"),
    (["--data.sources.a.pth", "1"], "unknown key data.sources.a.pth; did you mean data.sources.a.path?"),
    (["--zzzzzz"], "unknown key zzzzzz"),
    (["--data.context", "many"], "--data.context.*'many'"),
    (["--steps", "3.5"], "--steps.*3.5"),
    (["--lr"], "(?i)missing value.*--lr"),
    (["--data.sources.a.role", "bad"], "'bad'.*--data.sources.a.role.*'domain', 'general'"),
    (["--lr", "1", "stray"], "stray"),
    (["--data.packed", "maybe"], "(?i)maybe"),
    (["--data.context", "0"], "data.context is 0, but must be above 0"),
])
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(ValueError) as error:
        parse(Config, argv)
    assert re.search(message, one_line(error))


def test_rules_between_settings_hold_for_recipes_too(recipe):
    with pytest.raises(ValueError, match=r"data\.context is 0, but must be above 0"):
        parse(Config, [recipe("[data]\ncontext = 0\n")])


def test_unreadable_recipes(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"recipe .*absent\.toml does not exist; recipes/"):
        parse(Config, [str(tmp_path / "absent.toml")])
    with pytest.raises(ValueError, match="is not valid TOML"):
        parse(Config, [recipe("lr = = 1")])
    (tmp_path / "latin.toml").write_bytes(b'out = "\xff"')
    with pytest.raises(ValueError, match="is not valid TOML"):
        parse(Config, [str(tmp_path / "latin.toml")])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"], description="What it is.")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for text in ("What it is.", "--data.context", "tokens in a row", "2048"):
        assert text in shown


# ---- written down and read again

def test_to_toml_round_trip(recipe):
    config = Config(out='quo"te \\ back\nline\ttab é 漢字 🙂 \x00\x1f\x7f', lr=1e-05, steps=None, data=Data(
        context=7, packed=True, names=("a", "b\n"), prompts=["", "ü"], inner=Inner(1),
        sources={"plain": Source("p"), "with space": Source("q"), "do.t": Source("r", "general", 0.5),
                 "é": Source(weight=math.inf)}))
    text = to_toml(config)
    assert merge(Config(), read_toml(recipe(text))) == config
    values = tomllib.loads(text)
    assert values["data"]["names"] == ["a", "b\n"]
    assert values["data"]["sources"].keys() == config.data.sources.keys()
    assert "steps" not in values                               # a None has no TOML; it is the default
    assert merge(Config(), read_toml(recipe(to_toml(Config())))) == Config()
    assert to_toml(merge(Config(), read_toml(recipe(text)))) == text


@pytest.mark.parametrize("number", [0.0, 1.0, 1e-5, 3e-4, 1e16, 1e22, 1e-300, 0.1, math.inf, -math.inf])
def test_to_toml_keeps_numbers(recipe, number):
    back = merge(Config(), read_toml(recipe(to_toml(Config(lr=number))))).lr
    assert back == number
    assert type(back) is float


def test_to_toml_keeps_not_a_number(recipe):
    assert math.isnan(merge(Config(), read_toml(recipe(to_toml(Config(lr=math.nan))))).lr)

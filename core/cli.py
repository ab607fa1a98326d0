"""The command line of every file that a person runs: a command is a dataclass of options and a function.

    @dataclass(kw_only=True)
    class Pack:
        \"\"\"Tokenise files into shards.\"\"\"
        files: Positional[list[str]]
        \"\"\"Text files, or Hub datasets.\"\"\"
        reading: Reading = field(default_factory=Reading)

    def main() -> int:
        return cli.run("data.py", __doc__, {"pack": (Pack, pack), "verify": (Verify, verify)})

The function takes the options and returns the value that `--json FILE` writes, or an integer, its exit status. Options
that several commands share are dataclasses of this file, so that they have the same names and defaults everywhere.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import typing
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors import SafetensorError

from core import config, signals
from core.config import check_limits, merge, quote_key, read_toml, setting, setting_names, tables, unquote_key
from core.errors import UserError, nearest
from core.files import write_json
from core.output import keep_printing

ROOT = Path(__file__).resolve().parent.parent
# Words without an option's name: FILE...
Positional = tyro.conf.Positional
# A list whose option is repeated for each value, because files may follow it: --rule A --rule B FILE
Repeated = tyro.conf.UseAppendAction
# How tyro spells a flag: `--train.compile True` where options are a recipe's keys; else `--overwrite` and `--no-pii`.
RECIPE_MARKS = (tyro.conf.FlagConversionOff,)
COMMAND_MARKS = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
Dtype = typing.Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]


# ---- options that several commands share

@dataclass
class Reading:
    """How text is read."""

    documents: typing.Literal["line", "blank", "file"] = "blank"
    """What a document of a text file is: a line, a block between blank lines, or the file."""
    separator: str | None = None
    """The string that stands between the documents of a text file, instead of --documents."""
    column: str = "text"
    """The field of a record that holds its text; content.text is the field text of the object content."""
    config: str | None = None
    """The configuration of a Hub dataset."""
    split: str = "train"
    """The split of a Hub dataset."""
    max_record_mb: float = setting(16.0, above=0, at_most=1e6)
    """A larger document is refused: to tokenise one takes about 150 times its size in memory."""
    max_expansion: float = setting(200.0, at_least=1, at_most=1e9)
    """A compressed file that grows more than so many times is refused, from 128 MB on."""

    @property
    def max_bytes(self) -> int:
        return int(self.max_record_mb * 1e6)


@dataclass
class Device:
    """Where and how a model computes."""

    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda or cuda:N."""
    dtype: Dtype = "float32"
    """The type of the weights."""


@dataclass(kw_only=True)
class Output:
    """Where the result goes."""

    out: str
    """The folder to make."""
    overwrite: bool = False
    """Replace the folder if it exists."""


# ---- running a command

def run(program: str, description: str, commands, recipe: bool = False, argv: list[str] | None = None) -> int:
    """Parse the command line, call the command's function and return the exit status.

    `commands` is one (options class, function) or {"name": (options class, function)}. A mistake of the user's prints
    one line and gives its status, mostly 2; Ctrl-C gives 130. Other exceptions pass through: they are bugs of ours.
    Where standard output could not be written the work is done all the same, and the status is 2.
    """
    with keep_printing() as find_loss:
        status = _run(program, description, commands, recipe, list(sys.argv[1:] if argv is None else argv))
        if status == 0 and (lost := find_loss()):
            print(f"error: the output could not be written ({lost.strerror}); what goes to files is complete",
                  file=sys.stderr)
            return 2
        return status


def take_settings(argv: list[str], section: str = r"[a-z_-]+") -> tuple[list[str], list[str]]:
    """(the other words, those of a recipe's section, or of any: --section.key and the values behind it)."""
    words, settings = [], []
    taken = words
    for word in argv:
        if word.startswith("--"):
            taken = settings if re.match(rf"--{section}\.", word) else words
        taken.append(word)
    return words, settings


def _run(program: str, description: str, commands, recipe: bool, argv: list[str]) -> int:
    try:
        if isinstance(commands, dict):
            name = _choose(program, description, commands, argv)
            commands, program, argv = commands[name], f"{program} {name}", argv[1:]
            description = commands[0].__doc__
        cls, function = commands
        json_file = _take_json(argv)
        if json_file and Path(json_file).is_dir():
            raise UserError(f"--json {json_file} is a folder; name a file in it")
        try:
            options = parse(cls, argv, program, description, recipe)
        except UserError as error:
            if os.environ.get("RANK", "0") != "0":
                # torchrun gave all ranks the same words, and rank 0 says what is wrong with them.
                return error.status
            raise
        result = function(options)
        if json_file and not isinstance(result, int):
            write_json(json_file, result)
        return result if isinstance(result, int) else 0
    except (UserError, OSError, SafetensorError) as error:
        # The user can mend the last two as well: the disk is full, a file may not be read or is damaged.
        # Of a copy that failed the second name is the one that was written.
        file = getattr(error, "filename2", None) or getattr(error, "filename", None)
        text = f"{error.strerror}: {file}" if file else str(error)
        # What strangers wrote may be of any length.
        print(f"error: {' '.join(text.split())[:4000]}", file=sys.stderr)
        return getattr(error, "status", 2)
    except KeyboardInterrupt as stop:
        why, status = (stop.why, stop.status) if isinstance(stop, signals.Stopped) else ("SIGINT", 130)
        print(f"stopped by {why.replace('SIGINT', 'Ctrl-C')}", file=sys.stderr)
        return status


def parse(cls, argv: list[str], program: str = "", description: str = "", recipe: bool = False, default=None):
    """The options `cls` filled from the words `argv`; a UserError of one line where they are wrong.

    With `recipe` the first word may be a RECIPE.toml, whose values replace the defaults and are replaced by the words
    after it; options are prefixed by their sections (`--train.steps 10`). Without it, nested options have no prefix.
    `default`: an instance of `cls` with other defaults, as from a recipe that was read elsewhere.
    """
    argv, aliases = list(argv), {}
    words = argv[:argv.index("--")] if "--" in argv else argv
    asks_for_help = bool({"-h", "--help"} & set(words))
    if recipe:
        default = cls() if default is None else copy.deepcopy(default)
        if argv and not argv[0].startswith("-"):
            default = merge(default, read_toml(argv.pop(0)))
            check_limits(default)
        if asks_for_help:
            for _, sections, section in tables(default):
                sections.clear()
                sections["NAME"] = section()
        else:
            aliases = _alias_names(default, argv)
    known = _find_options(cls if default is None else default, recipe)
    try:
        # In UTF-8, because tyro draws its boxes with the characters of its output's encoding.
        screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        argv = ["--help"] if asks_for_help else _spell(argv, known, setting_names(cls) if recipe else None)
        with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(screen):
            options = tyro.cli(cls, args=argv, prog=program or None, description="DESCRIPTION",
                               config=RECIPE_MARKS if recipe else COMMAND_MARKS,
                               **({"default": default} if recipe else {}))
    except UserError as error:
        raise UserError(_restore_names(str(error), aliases)) from None
    except SystemExit as stop:
        screen.seek(0)
        if not stop.code:
            print(_tidy_help(screen.read(), recipe).replace("DESCRIPTION", _shorten(description), 1), end="")
            raise
        if recipe:
            # Where a relation between settings does not hold, a value beyond its own limits comes first.
            _check_words(default, argv, aliases)
        raise UserError(_restore_names(_read_error(screen.read()), aliases)) from None
    for name, (kind, value) in known.items():
        if kind == "positional" and value is dataclasses.MISSING and not getattr(options, name):
            raise UserError(f"name at least one {name.upper().removesuffix('S')} ({program} --help shows how)")
    for table, sections, _ in tables(options) if aliases else ():
        named = {aliases[f"{table}.{alias}"]: section for alias, section in sections.items()}
        sections.clear()
        sections.update(named)
    check_limits(options, option_of=str if recipe else lambda name: _spell_flag(name.rpartition(".")[2]))
    return options


def _alias_names(config, argv: list[str]) -> dict[str, str]:
    """Call the named sections of `config` n0, n1, ... there and in the words `argv` that set them, `--TABLE.NAME.key`,
    because names are the user's and the parser would spell them as options. NAME stands in a word as it is, or quoted
    as a key of TOML; a name that only words have gets a section. -> {TABLE.ALIAS: name}."""
    aliases, end = {}, argv.index("--") if "--" in argv else len(argv)
    for table, sections, section in tables(config):
        option = re.compile(rf"--{re.escape(table).replace('_', '[-_]')}"
                            r"""\.("(?:[^"\\]|\\.)*"|'[^']*'|[^=]*)\.([^.=]+(?:=.*)?)""", re.S)
        found = {i: match for i, word in enumerate(argv[:end]) if (match := option.fullmatch(word))}
        names = {name: f"n{i}" for i, name in enumerate(dict.fromkeys(
            [*sections, *(unquote_key(match[1]) for match in found.values())]))}
        for i, match in found.items():
            argv[i] = f"--{table}.{names[unquote_key(match[1])]}.{match[2]}"
        aliased = {alias: sections.get(name) or section() for name, alias in names.items()}
        sections.clear()
        sections.update(aliased)
        aliases |= {f"{table}.{alias}": name for name, alias in names.items()}
    return aliases


def _check_words(default, argv: list[str], aliases: dict[str, str]):
    """UserError for the first of the words --NAME=VALUE whose number is outside the limits of its setting."""
    for word in argv:
        name, equals, text = word.removeprefix("--").partition("=")
        section, (*path, last) = default, name.split(".")
        for part in path if equals else ():
            section = section[part] if isinstance(section, dict) else getattr(section, part)
        limits = [item.metadata.get("limits", {}) for item in dataclasses.fields(section)
                  if equals and item.name == last]
        try:
            value = float(text) if limits else None
        except ValueError:
            continue
        config.check_value(_restore_names(name, aliases), value, *limits or [{}])


def _restore_names(text: str, aliases: dict[str, str]) -> str:
    """A message of the parser with the user's names in place of their aliases."""
    for alias, name in reversed(aliases.items()):
        text = text.replace(f"{alias}.", f"{alias.rpartition('.')[0]}.{quote_key(name)}.")
    return text


def _choose(program: str, description: str, commands: dict, argv: list[str]) -> str:
    """The name of the command, which is the first word; prints the list of commands where help is asked for."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, commands))
        print(f"usage: {program} {'|'.join(commands)} ...\n\n{_shorten(description)}\n\ncommands:")
        for name, (cls, _) in commands.items():
            print(f"  {name:{width}}  {cls.__doc__.strip().splitlines()[0]}")
        print(f"\n{program} COMMAND --help lists the options of one.")
        if argv:
            raise SystemExit(0)
        raise UserError(f"name a command: {program} {'|'.join(commands)}")
    if argv[0] not in commands:
        raise UserError(f"unknown command {argv[0]}{nearest(argv[0], commands)} ({program} has {', '.join(commands)})")
    return argv[0]


def _take_json(argv: list[str]) -> str | None:
    """Take --json FILE, which every command has, out of `argv`; -> FILE."""
    end = argv.index("--") if "--" in argv else len(argv)
    for i, word in enumerate(argv[:end]):
        option, _, file = word.partition("=")
        if option == "--json":
            del argv[i]
            if word == "--json" and i + 1 < end:
                file = argv.pop(i)
            if not file:
                raise UserError("--json needs the name of a file")
            return file
    return None


def run_command(program: str, *words, threads: int | None = None, show: bool = False) -> str:
    """Run a command of this checkout in a process of its own, with OMP_NUM_THREADS of `threads` if given; returns what
    it printed.

    With `show` the command and all that it prints are shown instead. A signal to this process is passed on, and the
    command is waited for, so that it can save. A failure is a UserError with the command's exit status (128 + number
    where a signal ended it) and the last line that it printed.
    """
    words = list(map(str, words))
    if show:
        print(f"\n$ python {' '.join([program, *words])}", flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    file = [ROOT / program]
    if "/" in program and not Path(program).is_absolute():
        # A file in a folder of ours is a module: Python finds its imports from the folder of this checkout.
        file = ["-m", program.removesuffix(".py").replace("/", ".")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    pipes = {} if show else {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A terminal sends Ctrl-C to all of a group. A group of its own gets it once, from us. Threads get no signals.
    passes_on, received = threading.current_thread() is threading.main_thread(), []
    with subprocess.Popen([sys.executable, *file, *words], text=True, errors="replace", env=environment,
                          process_group=0 if passes_on else None, **pipes) as child, \
            (signals.handle(lambda number: (received.append(number), child.send_signal(number))) if passes_on
             else contextlib.nullcontext()):
        out, err = child.communicate()
    status = 128 - child.returncode if child.returncode < 0 else child.returncode
    if status == 0 and received:
        # It ended before the signal reached it; what was to follow does not begin.
        status = 128 + received[0]
    if status > 128:
        raise UserError(f"{program} was stopped by {signal.Signals(status - 128).name}", status)
    if status:
        said = (err or out or "its error stands above").strip().splitlines()
        raise UserError(f"{program} failed: {''.join(said[-1:]).removeprefix('error: ')}", status)
    return out or ""


# ---- the words of a command line

def _find_options(value, recipe: bool, prefix: str = "") -> dict[str, tuple[str, object]]:
    """{name: (kind, default)} of the options of a dataclass, or of an instance with its tables of named sections.

    The kind is flag, value, list (--text A B), repeated (--rule A --rule B) or positional (FILE...).
    """
    cls = value if isinstance(value, type) else type(value)
    hints, out = typing.get_type_hints(cls, include_extras=True), {}
    for item in dataclasses.fields(cls):
        hint, name = hints[item.name], prefix + item.name
        marks = getattr(hint, "__metadata__", ())
        # An option may have another name than its field, where that would be a word of Python: --for.
        name = next((prefix + mark.name for mark in marks if getattr(mark, "name", None)), name)
        plain = typing.get_args(hint)[0] if marks else hint
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        current = default if isinstance(value, type) else getattr(value, item.name)
        if isinstance(current, dict):
            for key, entry in current.items():
                out |= _find_options(entry, recipe, f"{name}.{key}.")
        elif dataclasses.is_dataclass(plain):
            out |= _find_options(plain if isinstance(value, type) else current, recipe, f"{name}." if recipe else "")
        elif Positional in marks:
            out[name] = "positional", current
        elif typing.get_origin(plain) in (list, tuple):
            out[name] = "repeated" if Repeated in marks else "list", current
        elif plain is bool:
            out[name if recipe or not current else f"no_{name}"] = "flag", current
        else:
            out[name] = "value", current
    return out


def _spell(argv: list[str], known: dict, settings: list[str] | None) -> list[str]:
    """The words as tyro expects them; UserError with the nearest name for an unknown option.

    settings: all names of a recipe; None where the options are a command's. A recipe's `--flag` becomes `--flag True`.
    The values of a list that is given in several places are gathered at the first: `--text a --out x --text b` becomes
    `--text a b --out x`.
    """
    kinds = {name: kind for name, (kind, _) in known.items() if kind != "positional"}
    groups, lists = [[]], {}
    group, is_flag, is_value = groups[0], False, False
    for position, word in enumerate(argv):
        if word == "--":
            groups.append(argv[position:])
            break
        if not re.match("--[A-Za-z]", word):
            if is_value and len(group) == 1:
                # `--prompt "-x y"`: the word after an option is its value, whatever it begins with.
                group[0] += f"={word}"
                is_value = False
            else:
                group.append(word.capitalize() if is_flag else word)
            continue
        option, equals, value = word.partition("=")
        name = option[2:].replace("-", "_")
        if name not in kinds:
            if settings:
                raise UserError(f"unknown key {name}{nearest(name, [*kinds, *settings])}")
            raise UserError(f"unknown option {option}{nearest(option, [*map(_spell_flag, kinds), '--json'])}")
        if kinds[name] == "list" and name in lists:
            group = lists[name]
        else:
            group = lists[name] = [f"--{name}"]
            groups.append(group)
        is_flag, is_value = bool(settings) and kinds[name] == "flag", kinds[name] == "value" and not equals
        if is_flag:
            following = argv[position + 1].lower() if position + 1 < len(argv) else ""
            if equals or following not in ("true", "false"):
                group.append(value.capitalize() or "True")
        elif kinds[name] == "flag" and equals:
            raise UserError(f"{option} takes no value")
        elif kinds[name] == "value" and equals:
            group[0] = f"--{name}={value}"
        elif equals:
            group.append(value)
    return [word for group in groups for word in group]


def _spell_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _read_error(screen: str) -> str:
    """The sentence that tyro says of a mistake: the first lines in its box, up to the hint at the help."""
    text = re.split(r"\n *(?:Argument|For full) helptext", _strip_frame(screen).split("\n", 2)[2])[0]
    text = re.sub(r"^Error parsing (--\S+): ", r"\1: ", " ".join(text.split()))
    wrong_type = r"no type matching (?:\{None\}\|)?(\S+) could be instantiated from \['(.*?)'\].*"
    text = re.sub(wrong_type, r"'\2' is no \1", text)
    # With a None among the choices they come in an order that changes from run to run.
    text = re.sub(r"\(([^()]*'None'[^()]*)\)", lambda found: "({})".format(", ".join(
        sorted(set(found[1].split(", ")) - {"'None'"}))), text)
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no INT", text)
    text = re.sub(r"could not convert string to float: (.*)", r"\1 is no FLOAT", text)
    # A rule across the fields of a section (its __post_init__) names the setting itself, so tyro need not.
    return re.sub(r"^Error parsing [\w.]+: ", "", text)


def _shorten(docstring: str) -> str:
    """The first paragraph of a docstring and the command lines below it, in 80 columns."""
    first, *others = inspect.cleandoc(docstring or "").split("\n\n")
    lines = textwrap.wrap(first, 79)
    if others and others[0].startswith("    "):
        lines.append("")
        for example in others[0].replace("\\\n", " ").splitlines():
            # After three spaces comes an explanation of the command, for readers of the file.
            command = re.split(r"\s{3,}", example.strip())[0]
            lines += textwrap.wrap(command, 79, initial_indent="    ", subsequent_indent=" " * 8)
    return "\n".join(lines)


def _tidy_help(screen: str, recipe: bool) -> str:
    """tyro's help without frames and without what tells nothing: `STR` for `{None}|STR`, no `(default: None)`."""
    text = _strip_frame(screen)
    # The spaces keep the text to the right in its column.
    text = re.sub(r"\{None\}\|(\S+)", r"\1       ", text)
    text = re.sub(r"(?m)^(  -.*)\[(\w+) \[\2 \.\.\.\]\]", r"\1\2 ...        ", text)
    # In a command the option's own name says whether it is on by default: --overwrite, --no-pii.
    text = re.sub(rf" *\(default: (None||''{'' if recipe else '|True|False'})\)", "", text)
    text = re.sub(r" +\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"\n+(?=  -)", "\n", text))
    usage, body = text.strip().replace("{None,", "{").split("\n", 1)
    usage = textwrap.fill(usage, 79, subsequent_indent=" " * 8, break_on_hyphens=False)
    return f"{usage}\n{body}\n\n--json FILE writes the result as data.\n"


def _strip_frame(screen: str) -> str:
    """tyro's boxes without their borders, each after an empty line and its title."""
    text = re.sub(r"(?m)^╭─ (.+?) ─+╮$", r"\n\1:", screen)
    text = re.sub(r"(?m)^│ ?| *│$", "  ", text)
    return re.sub(r"(?m)^[─╰╯ ]+$| +$", "", text)

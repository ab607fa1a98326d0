"""The pages keep their word. Truth: the commands' own options, the files of the checkout, the headings of the pages.

A command line of a page is parsed as if it were typed, up to the moment where the work would begin.
"""

import ast
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from core import cli
from text.mixture import SourceConfig

ROOT = Path(__file__).parent.parent
README, GUIDE, RESULTS = ROOT / "README.md", ROOT / "docs/GUIDE.md", ROOT / "docs/RESULTS.md"
PAGES = [README, GUIDE, RESULTS]
# Folders of the product; tests and experiments' results are no part of the file map.
FOLDERS = ("core", "kernels", "text", "learn", "stages", "measure", "experiments")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def command_lines(page: Path) -> list[str]:
    """The commands in the page's blocks of code: continuation lines joined, comments left out."""
    lines = []
    for block in re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if re.match(r"([A-Z_0-9]+=\S+ )*(python|torchrun|make) ", line) \
                else []
            if words:
                lines.append(" ".join(map(shlex.quote, words)))
    return lines


class Captured(Exception):
    """What a command file hands to cli.run."""


def commands_of(file: str, monkeypatch) -> tuple:
    """(commands, recipe) of a command file, which is run until it hands them to cli.run."""
    def capture(program, description, commands, recipe=False, argv=None):
        raise Captured(commands, recipe)

    monkeypatch.setattr(cli, "run", capture)
    monkeypatch.setattr(sys, "path", [str(ROOT), str((ROOT / file).parent), *sys.path])
    with pytest.raises(Captured) as captured:
        runpy.run_path(str(ROOT / file), run_name="__main__")
    return captured.value.args


CASES = [pytest.param(line, id=f"{page.stem} {line[:60]}") for page in PAGES for line in command_lines(page)]


@pytest.mark.parametrize("line", CASES)
def test_a_documented_command_names_options_and_files_that_exist(line, monkeypatch):
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_0-9]+=\S+", word)]
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        return
    file = next(word for word in words if word.endswith(".py"))
    argv = words[words.index(file) + 1:]
    for word in words:
        if re.match(r"(recipes|experiments|tests|docs)/", word):
            assert (ROOT / word).exists(), word
    commands, recipe = commands_of(file, monkeypatch)
    monkeypatch.chdir(ROOT)
    if isinstance(commands, dict):
        assert argv[0] in commands, f"{file} has {', '.join(commands)}"
        options, argv = commands[argv[0]][0], argv[1:]
    else:
        options = commands[0]
    cli._take_json(argv)
    cli.parse(options, argv, file, "", recipe)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_in_the_text_exist(page, monkeypatch):
    """`--section.key` is an option of train.py, any other one of some command."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    named = {word for span in re.findall(r"`([^`]*)`", text) for word in re.findall(r"--([a-z][\w.-]*)", span)}
    # The name of a source is the user's.
    named = {re.sub(r"^data\.sources\.\w+", "data.sources.NAME", name) for name in named}
    # tee is an option of torchrun.
    known = {"help", "json", "section.key", "tee", *(f"data.sources.NAME.{name}" for name in vars(SourceConfig()))}
    for file in sorted([*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")]):
        if "cli.run(" in file.read_text(encoding="utf-8"):
            commands, recipe = commands_of(name_of(file), monkeypatch)
            for options, _ in commands.values() if isinstance(commands, dict) else [commands]:
                known |= set(cli._find_options(options() if recipe else options, recipe))
    known = {name.replace("_", "-") for name in known}
    assert not named - known, sorted(named - known)


def heading_ids(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings: lower case, without punctuation, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        if anchor:
            assert anchor in heading_ids(target), link


def test_the_walks_name_what_the_files_define():
    """[`Loader.batch`](../data.py) leads to a file with a class Loader that has a function batch."""
    walks = GUIDE.read_text(encoding="utf-8").split("## How to find your way")[1]
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", walks)
    for shown, path in links:
        scope = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for name in shown.removeprefix(f"{Path(path).stem}.").split("."):
            found = [node for node in scope.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                     and node.name == name]
            assert found, f"{path} defines no {shown}"
            scope = found[0]
    by_walk = [len(re.findall(r"^\d+\. ", walk, re.M)) for walk in walks.split("\n\n**")[1:]]
    assert len(by_walk) == 3
    assert by_walk[0] <= 15
    assert by_walk[1] <= 12


def test_the_front_page_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_file_map_has_every_product_file_once():
    page = README.read_text(encoding="utf-8")
    section = re.search(r"^## The files.*?(?=^## )", page, re.M | re.S)[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.M)
    listed = [file for cell in cells for file in re.findall(r"`([\w/]+\.py)`", cell)]
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    product = [file for file in tracked.split()
               if ("/" not in file or file.split("/")[0] in FOLDERS) and not file.endswith("__init__.py")]
    assert not set(product) - set(listed), "the file map in README.md needs a row for each of these"
    assert not set(listed) - set(product), "the file map in README.md has files that are gone"
    assert len(listed) == len(set(listed))

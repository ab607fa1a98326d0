"""lm-evaluation-harness on the same local files: what measure/tasks.py is compared with."""

import json
import logging
import os

import pytest
import torch


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
    return HFLM(pretrained=AutoModelForCausalLM.from_pretrained(folder), batch_size=4, device="cpu",
                add_bos_token=own.add_bos, tokenizer=fast)


def make_lm(model, encode, decode, bos: int, longest: int, batch_size: int = 8):
    """lm-evaluation-harness' own class for transformers' models, over a tokenizer given by its two functions. `add_bos`
    of it says whether BOS stands before what is encoded."""
    need_lm_eval()
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2TokenizerFast

    class Model(HFLM):
        add_bos = True

        def tok_encode(self, string, add_special_tokens=None, **_):
            return [bos] * (self.add_bos if add_special_tokens is None else add_special_tokens) + encode(string)

        def tok_decode(self, tokens, skip_special_tokens=True):
            return decode([tokens] if isinstance(tokens, int) else tokens)

        def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
            encoded = [self.tok_encode(string)[-(left_truncate_len or longest):] for string in strings]
            size = max(map(len, encoded))
            return (torch.tensor([[0] * (size - len(ids)) + ids for ids in encoded]),
                    torch.tensor([[0] * (size - len(ids)) + [1] * len(ids) for ids in encoded]))

        @property
        def prefix_token_id(self):
            return bos

        @property
        def max_length(self):
            return longest
    # The class wants a tokenizer of transformers', of which nothing is used.
    empty = GPT2TokenizerFast(vocab={"<s>": 0, "a": 1}, merges=[], bos_token="<s>", eos_token="<s>", unk_token="<s>")
    return Model(pretrained=model, tokenizer=empty, batch_size=batch_size, device="cpu", backend="causal")


def score(lm, tasks: dict[str, dict], shots: int = 0) -> tuple[dict, dict]:
    """({task: {metric: value}}, {task: [[(log-likelihood, is greedy) of each request] of each item]}) of
    {task: settings, with "file"}."""
    lm_eval = need_lm_eval()
    from lm_eval.api.task import ConfigurableTask
    made = {}
    for name, settings in tasks.items():
        settings = dict(settings)
        files = {"test": str(settings.pop("file"))}
        made[name] = ConfigurableTask(config={
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test",
            "num_fewshot": shots, **settings})
    found = lm_eval.evaluate(lm, made, bootstrap_iters=0, log_samples=True)
    answers = {name: [[(float(nats), str(is_best) == "True") for [(nats, is_best)] in sample["resps"]]
                      for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
               for name, samples in found["samples"].items() if made[name].OUTPUT_TYPE in ("multiple_choice",
                                                                                           "loglikelihood")}
    return {name: {key.removesuffix(",none"): value for key, value in own.items() if key.endswith(",none")}
            for name, own in found["results"].items()}, answers


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


CHOICE = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"},
                                                            {"metric": "acc_bytes"}]}

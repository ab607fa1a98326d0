"""Our models under lm-evaluation-harness' tasks (extra eval), all thousands of them.

    python -m measure.lm_eval --model out/legal/final --tasks arc_easy ifeval --limit 200 --json scores.json
    python -m measure.lm_eval --model out/legal/final --tasks my_task --include my_tasks/

In Python, behind `import measure.lm_eval`, it is lm_eval.simple_evaluate(model="nanocpt", model_args="pretrained=DIR").

Nothing of ours imports this file. Tasks of its own list come from the Hub; those in a folder (--include) need no
network if their dataset_path is json and their data_files are here. measure/likelihoods.py computes once what requests
have in common; how texts are cut into context, continuation and windows is the harness' own.
"""

import core.threads

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hf
import tokenizer as tokenizers
from core import cli, devices
from core.config import setting
from core.errors import UserError
from generate import Settings
from measure.completions import complete_all
from measure.likelihoods import log_likelihoods
from text.vocabulary import token_before_document

try:
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
except ImportError:
    # It is an extra: the command says so.
    lm_eval, TemplateLM = None, object


class Adapter(TemplateLM):
    """A model of ours as the harness asks one. pretrained: its folder or hf:// id."""

    # Tokens that the harness' own class generates where a task does not say how many.
    MAX_NEW_TOKENS = 256

    def __init__(self, pretrained: str, batch_size: int = 32, device: str = "auto", dtype: str = "float32",
                 context: int | None = None, **_):
        super().__init__()
        base = hf.open_base(pretrained)
        self.model = hf.load(base, devices.DTYPES[dtype], devices.pick_device(device or "auto")).eval()
        self.reader, self.batch_size = tokenizers.load(base.folder), int(batch_size)
        self.max_length = min(self.model.config.max_position_embeddings, context or math.inf)

    @property
    def eot_token_id(self):
        return self.reader.eos_id

    @property
    def prefix_token_id(self):
        return token_before_document(self.reader)

    @property
    def tokenizer_name(self):
        return self.reader.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        bos = self.reader.add_bos if add_special_tokens is None else add_special_tokens
        return [int(i) for i in self.reader.encode(string, bos=bos)]

    def _loglikelihood_tokens(self, requests, **_):
        questions = [[(context, continuation)] for _, context, continuation in requests]
        found, _ = log_likelihoods(self.model, questions, None, self.max_length, self.batch_size)
        return [answer for [answer] in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        windows = [[(None, *utils.make_disjoint_window(window)) for window in utils.get_rolling_token_windows(
            token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
            context_len=1)] for text, in (request.args for request in requests)]
        answers = iter(self._loglikelihood_tokens([window for own in windows for window in own]))
        return [sum(next(answers)[0] for _ in own) for own in windows]

    def generate_until(self, requests, disable_tqdm: bool = False):
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        texts = {}
        for own in groups.values():
            asked = normalize_gen_kwargs(requests[own[0]].args[1], self.MAX_NEW_TOKENS)
            eos = "" if self.eot_token_id is None else self.reader.decode([self.eot_token_id])
            settings = Settings(max_new_tokens=asked["max_gen_toks"], temperature=asked.get("temperature", 0.0),
                                top_p=asked.get("top_p", 1.0), top_k=asked.get("top_k", 0))
            stop = [text for text in handle_stop_sequences(asked["until"], eos=eos) if text]
            found, _ = complete_all(self.model, self.reader, [requests[i].args[0] for i in own], stop, settings,
                                    self.max_length, self.batch_size)
            texts.update(zip(own, found))
        return [texts[i] for i in range(len(requests))]


if lm_eval:
    register_model("nanocpt")(Adapter)


# ---- command

@dataclass(kw_only=True)
class Harness:
    """Score a model under lm-evaluation-harness' tasks."""
    model: str
    """Model folder or hf:// id."""
    tasks: list[str]
    """Names of tasks of the harness."""
    include: str | None = None
    """A folder with task files (.yaml) of your own; then only these are known."""
    shots: int | None = setting(None, at_least=0, at_most=100)
    """Examples before each item (default: the task's own number)."""
    limit: int | None = setting(None, at_least=1)
    """Items of each task at most: its first ones."""
    context: int | None = setting(None, at_least=1)
    """Tokens that the model sees at most (default: the model's positions)."""
    batch_size: int = setting(32, at_least=1)
    """Sequences that go through the model at a time."""
    device: cli.Device = field(default_factory=cli.Device)


def run_harness(options: Harness) -> dict:
    if not lm_eval:
        raise UserError("lm-evaluation-harness is not installed: pip install 'lm-eval>=0.4.13,<0.5'")
    if options.include and not Path(options.include).is_dir():
        raise UserError(f"--include {options.include} is no folder")
    manager = TaskManager(include_path=options.include, include_defaults=not options.include)
    if unknown := [name for name in options.tasks if name not in manager.all_tasks]:
        known = f" ({options.include} has {', '.join(sorted(manager.all_tasks))})" if options.include else ""
        raise UserError(f"lm-evaluation-harness has no task {unknown[0]}{known}")
    adapter = Adapter(options.model, options.batch_size, options.device.device, options.device.dtype, options.context)
    found = lm_eval.simple_evaluate(model=adapter, tasks=options.tasks, task_manager=manager, limit=options.limit,
                                    num_fewshot=options.shots, bootstrap_iters=0)
    print(utils.make_table(found))
    return {"model": options.model, "results": found["results"], "versions": found["versions"],
            "shots": found["n-shot"], "items": found["n-samples"]}


def main() -> int:
    return cli.run("lm_eval.py", __doc__, (Harness, run_harness))


if __name__ == "__main__":
    sys.exit(main())

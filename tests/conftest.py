"""What several test files share. NANOCPT_DATA=folder-with-real-inputs adds the tests that need real text and models."""

import core.threads

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("NANOCPT_FAULT_SECONDS", "60")
os.environ["HF_HUB_OFFLINE"] = "1"          # read when huggingface_hub is imported: a test never waits for a network

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"    # read when a kernel is defined: the tests run kernels in numpy

import forked as fork_server
import torch.nn.functional as F
from runs import base, lab, quick, whole
from synthetic import some_texts, texts
from vocabularies import make_small_bases

import forget
import hf
import tokenizer as tokenizers
from model import Model, ModelConfig

__all__ = ["base", "lab", "quick", "whole"]          # fixtures
DATA = os.environ.get("NANOCPT_DATA")       # as it is at the start: a benchmark's test runs without it

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@torch.no_grad()
def large_weights(model, seed: int = 0):
    """Weights so large that the logits of a tiny model are of order 1 to 5, the same for the same seed and model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.copy_(torch.empty(parameter.shape).normal_(centre, 0.2, generator=generator))
    return model


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real inputs (models, tokenizers, corpora), read only."""
    if not DATA:
        pytest.skip("NANOCPT_DATA is not set; it names the folder with real models, tokenizers and corpora")
    return Path(DATA)


@pytest.fixture(scope="session")
def tiny_bpe(tmp_path_factory) -> Path:
    """The folder of a byte-level BPE of 300 ids."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizers.train(some_texts(200), "bpe", 300, folder)
    return folder


@pytest.fixture(scope="session")
def small_bases(tmp_path_factory) -> dict[str, Path]:
    """{"small bytes": folder, "small pieces": folder} of two tokenizers that can be extended."""
    return make_small_bases(tmp_path_factory.mktemp("small_bases"))


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """(base, result, domain text, general text): folders with a tokenizer; the result knows the domain better."""
    folder = tmp_path_factory.mktemp("pair")
    tok = tokenizers.train(texts("legal") + texts("story"), "bpe", 300, folder / "tok")
    sizes = SIZES | {"vocab_size": tok.vocab_size, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = Model(ModelConfig(**sizes))
    model.initialise(0)

    def train(kinds, steps):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rows = [torch.tensor(tok.encode(t, bos=True)[:12]) for kind in kinds for t in texts(kind)]
        tokens = torch.stack([row for row in rows if len(row) == 12])
        for _ in range(steps):
            batch = tokens[torch.randperm(len(tokens))[:16]]
            loss = F.cross_entropy(model.head(model(batch[:, :-1])).flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    train(["story"], 40)
    hf.save(model, folder / "base", tokenizer=folder / "tok")
    train(["legal"], 15)
    hf.save(model, folder / "result", tokenizer=folder / "tok", shard_bytes=40_000)
    for kind in ("legal", "story"):
        (folder / f"{kind}.txt").write_text("\n".join(texts(kind, 255)[240:]))
    return folder / "base", folder / "result", folder / "legal.txt", folder / "story.txt"


@pytest.fixture(scope="session")
def forked_python():
    """In the place of sys.executable: processes that have imported already (forked.py)."""
    with fork_server.python() as program:
        yield program


@pytest.fixture
def forked(forked_python, monkeypatch):
    """The commands that a test starts, and those that they start, have imported already."""
    monkeypatch.setattr(sys, "executable", forked_python)


@pytest.fixture
def forget_py(monkeypatch):
    """forget_py(argument, ...) -> exit status of forget.py, with the commands that it hands over."""
    def run(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["forget.py", *map(str, words)])
        return forget.main()
    return run


@pytest.fixture
def fast_disk(monkeypatch):
    """Without waiting for the disk, which proves nothing where the machine does not lose its power."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture
def tiny_config():
    """tiny_config(field=value, ...) -> ModelConfig of 3 layers and 97 tokens."""
    return lambda **changes: ModelConfig(**{**SIZES, **changes})


@pytest.fixture
def tiny_model(tiny_config):
    """tiny_model(seed=0, field=value, ...) -> Model with large random weights, in eval mode."""
    return lambda seed=0, **changes: large_weights(Model(tiny_config(**changes)), seed).eval()


@pytest.fixture
def hf_model(tmp_path):
    """hf_model("qwen3", field=value, ...) -> (transformers' model with large random weights, its saved folder)."""
    transformers = pytest.importorskip("transformers", minversion="5", reason="the truth is transformers 5")
    transformers.utils.logging.disable_progress_bar()
    count = iter(range(1000))

    def build(family: str, **changes):
        config = transformers.AutoConfig.for_model(family, **{**SIZES, **changes})
        model = large_weights(transformers.AutoModelForCausalLM.from_config(config).eval())
        folder = tmp_path / f"{family}{next(count)}"
        model.save_pretrained(folder)
        return model, folder
    return build


@pytest.fixture(scope="session")
def peft():
    return pytest.importorskip("peft", reason="the truth is PEFT")


@pytest.fixture
def one_thread():
    """Steps of one token are too small to share; on a busy machine waiting for the other thread takes all the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def far_programs(monkeypatch):
    """Triton's interpreter with its int32 overflow check on, and every program number 3,000,000 higher: what a kernel
    computes from it lies behind 2^31, and behind the end of its data."""
    if torch.cuda.is_available():
        pytest.skip("only Triton's interpreter checks for overflow, and it runs where there is no GPU")
    from triton.runtime import interpreter
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    number = type(builder).create_get_program_id

    def far(axis):
        handle = number(builder, axis)
        handle.data = handle.data + handle.data.dtype.type(3_000_000)
        return handle
    monkeypatch.setattr(builder, "create_get_program_id", far)

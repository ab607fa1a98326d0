"""Speed and memory, side by side with the peer in one run; ratios are ours / peer, medians over rounds in turn.

    python bench.py data  --json out/bench_data.json       packing, reading, encoding, cleaning, dedup, each stage
                                                           beside datatrove's, datasets', datasketch's and others'
    python bench.py train --json out/bench_train.json      a training step against transformers on the same batches
    python bench.py lora  --json out/bench_lora.json       LoRA against PEFT on the same batches, and in 4 bits (QLoRA)
    python bench.py kernels --json out/bench_kernels.json  with a GPU: times beside torch.compile's, PyTorch's, Liger's;
                                                           without: what the compiler says of each kernel, CPU times
    python bench.py gpu --json out/bench_gpu.json          all that needs a GPU in 8 minutes: tests, kernels, steps

Each side of a training measurement is a process of its own, so that peaks of memory are its own (imports included).
Both get the same weights, batches, threads, dtype (fp32 on a CPU) and fused AdamW with clipping; a row's last target
counts on neither side, because theirs leaves it out. Theirs is the plain loop
`model(input_ids, labels=...).loss.backward(); clip; step`. What train.py does to its process counts as ours: it tells
glibc's allocator to keep freed memory. A row `..._their_allocator_too` gives the peer that setting as well.
"""

import core.threads

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import clean
import data
import dedup
import hf
import kernels
import lora
import tokenizer as tokenizers
from core import parallel
from core.config import ArgumentParser, main_guard
from kernels import measure
from kernels.attention import BACKENDS, interval_mask
from learn import peft_files
from learn.adapters import adapted_layers
from learn.objectives import IGNORE, Causal
from learn.optim import OptimConfig, make_optimizer
from model import Model, ModelConfig, matmul_flops_per_token
from text import vocabulary
from text.corpus import read_documents, read_records, utf8
from text.mixture import DataConfig
from text.packing import pack_sources
from text.shards import HEADER_BYTES, Shards, pack


def machine() -> dict:
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip() if shutil.which("git") else ""
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "commit": commit, "load_average": os.getloadavg()[0],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def row(name, unit, ours, peer=None, peer_name=None, **more) -> dict:
    out = {"name": name, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name,
           "ratio": ours / peer if peer else None, **more}
    numbers = f"{ours:12,.4g}" + (f"  {peer_name} {peer:12,.4g}  ratio {out['ratio']:.2f}" if peer else "")
    print(f"{name:34} {numbers}  {unit}" + (f"  (spread {more['spread']:.0%})" if "spread" in more else ""), flush=True)
    return out


def peak_bytes(device) -> int:
    """The most memory held so far, of the GPU or of this process. Not by getrusage: its maximum is inherited from the
    process that started this one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def spread(values) -> float:
    """Range of the middle half over the median."""
    q = statistics.quantiles(values, n=4) if len(values) > 2 else [min(values), 0, max(values)]
    return (q[2] - q[0]) / statistics.median(values)


# ---- data

def bench_data(args) -> list:
    """Packing and reading on all cores, then each stage on one, beside its peers on the same files.

    Cleaning and dedup get documents of about 2,000 characters (blocks of the text joined), a quarter of --mbytes at
    most and never repeated but for the copies that dedup has to find; the encoders get a quarter of --mbytes.
    """
    texts = [t.strip() for path in args.text for block in read_documents(path, "blank")
             for t in block.split("<|endoftext|>") if t.strip()]
    size = sum(len(utf8(t)) for t in texts)
    joined = max(1, round(2000 * len(texts) / size))
    documents = ["\n\n".join(texts[i:i + joined]) for i in range(0, len(texts), joined)]
    documents = documents[::math.ceil(4 * size / 1e6 / args.mbytes)]
    texts *= max(1, int(args.mbytes * 1e6 / size))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = write_jsonl(folder / "in/corpus.jsonl", texts)
        paths = args.tokenizer or [default_tokenizer(texts, folder)]
        for path in paths:
            rows += bench_packing(path, source, texts, folder, args.rounds)
        rows += bench_reading(folder, args.rounds)
        with one_core():
            real = Path(os.environ.get("NANOCPT_DATA", folder)).glob("tokenizers/*")
            for path in args.tokenizer or [*paths, *sorted(real)]:
                rows += bench_encoding(path, texts[::4], args.rounds)
            rows += bench_cleaning(documents, folder, args.rounds)
            rows += bench_dedup(with_copies(documents), folder, args.rounds)
    return rows


def write_jsonl(path, texts) -> Path:
    path.parent.mkdir()
    lines = (json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(texts))
    path.write_text("".join(lines), encoding="utf-8")
    return path


@contextlib.contextmanager
def one_core():
    """This thread, the threads and processes it starts, and the batches of `tokenizers` have one core."""
    cores, setting = os.sched_getaffinity(0), os.environ.get("TOKENIZERS_PARALLELISM", "true")
    os.sched_setaffinity(0, {max(cores)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        os.environ["TOKENIZERS_PARALLELISM"] = setting


def versus(unit: str, amount, ours, peers: dict, rounds: int, **more) -> list:
    """A row for each peer, {row's name: (package, or who it is in two words, call)}. All calls take turns after a first
    round that is not counted, every other round the other way round. amount: by which the rates are; None: what `ours`
    returns. What the calls return (tokens, documents kept) stands in `counts`; what a peer lacks, in `left_out`; spread
    is that of the ratios, round by round."""
    calls = {"": ours, **{name: call for name, (_, call) in peers.items()}}
    seconds, counts, missing = {name: [] for name in calls}, {}, {}
    for number in range(rounds + 1):
        for name in [*calls][::1 if number % 2 else -1]:
            start = time.perf_counter()
            try:
                counts[name] = calls[name]() if name not in missing else None
            except ImportError as error:
                if not name:
                    raise
                missing[name] = str(error).splitlines()[0]
            seconds[name].append(time.perf_counter() - start)
    rate = {name: (amount or counts[""]) / statistics.median(seconds[name][1:]) for name in calls.keys() - missing}
    rows = []
    for name, (who, _) in peers.items():
        if name in missing:
            rows.append(row(name, unit, rate[""], left_out=missing[name], **more))
            print(f"  no peer: {missing[name]}")
            continue
        ratios = [theirs / mine for mine, theirs in zip(seconds[""][1:], seconds[name][1:])]
        rows.append(row(name, unit, rate[""], rate[name], who if " " in who else f"{who} {version(who)}",
                        counts={"ours": counts[""], "peer": counts[name]}, spread=spread(ratios), **more))
    return rows


def default_tokenizer(texts, folder):
    """A byte-level BPE of 8,192 ids trained on the text, as GPT-2's two files."""
    from tokenizers import ByteLevelBPETokenizer
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts[:20000], vocab_size=8192, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "tokenizer").mkdir()
    trained.save_model(str(folder / "tokenizer"))
    return folder / "tokenizer"


def hugging_face_twin(path, tokenizer, texts):
    """The same tokenizer in the library that datasets.map is used with, or None; its ids are compared."""
    from tokenizers import ByteLevelBPETokenizer
    if tokenizer.library.startswith("tokenizers"):
        twin = tokenizer.backend
    elif tokenizer.kind == "gpt2":
        files = (str(Path(path) / name) for name in ("vocab.json", "merges.txt"))
        twin = ByteLevelBPETokenizer.from_file(*files)._tokenizer
    elif tokenizer.kind == "tiktoken":
        from transformers.convert_slow_tokenizer import TikTokenConverter
        file = Path(path) / "tokenizer.model" if Path(path).is_dir() else path
        twin = TikTokenConverter(str(file), vocabulary.LLAMA3_SPLIT,
                                 extra_special_tokens=vocabulary.LLAMA3_SPECIALS).converted()
    else:
        return None
    for text in texts[:200]:
        assert twin.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), "the two sides differ"
    return twin


def bench_packing(path, source, texts, folder, rounds) -> list:
    """Packing a jsonl file from disk to disk, all with the same tokenizer: on all cores against the encoder alone on
    the texts in memory and against datasets.map with group_texts as in transformers' run_clm.py; on one core against
    datatrove's DocumentTokenizer, which does not shuffle here, because pack does not."""
    tokenizer = tokenizers.load(path)
    twin = hugging_face_twin(path, tokenizer, texts)

    def ours(workers=2):
        manifest = pack(read_documents(str(source)), tokenizer, folder / "shards", heldout=0.0, workers=workers,
                        overwrite=True)
        return manifest["splits"]["train"]["tokens"]

    def datatrove():
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import DocumentTokenizer
        step = DocumentTokenizer(tempfile.mkdtemp(dir=folder), str(folder / "twin.json"), shuffle_documents=False,
                                 eos_token=tokenizer.id_to_token(tokenizer.eos_id))
        return datatrove_run(folder, ([JsonlReader(str(source.parent)), step], 1))["tokens"].total

    which = {"tokenizer": Path(path).name}
    rows = versus("tokens/s", None, ours, {"pack_vs_encoder": (tokenizer.library, lambda: encode(tokenizer, texts))},
                  rounds, **which)
    if twin:                                                # the better of its two ways to use the cores
        seconds = [datasets_pipeline(twin, source, folder, processes) for processes in (None, os.cpu_count())]
        rows.append(row("pack_vs_datasets", "tokens/s", rows[0]["ours"], rows[0]["counts"]["ours"] / min(seconds),
                        "datasets.map + group_texts", seconds_by_processes=seconds, spread=rows[0]["spread"], **which))
        twin.save(str(folder / "twin.json"))
        with one_core():
            rows += versus("tokens/s", None, lambda: ours(1), {"pack_vs_datatrove": ("datatrove", datatrove)},
                           min(3, rounds), **which)
    return rows


def encode(tokenizer, texts) -> int:
    """Tokens by the library's own batch call, on all cores that this thread may use, and nothing else."""
    cores = len(os.sched_getaffinity(0))
    if tokenizer.library.startswith("tokenizers"):
        return sum(map(len, tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)))
    if tokenizer.library.startswith("sentencepiece"):
        return sum(map(len, tokenizer.backend.encode(texts, num_threads=cores)))
    return sum(map(len, tokenizer.backend.encode_ordinary_batch(texts, num_threads=cores)))


def bench_encoding(path, texts, rounds) -> list:
    """encode_batch on one core against the batch call of the library behind it and, if that is another, the same
    tokenizer in `tokenizers`. Ours looks for surrogates and gives arrays, theirs lists or Encoding objects."""
    tokenizer = tokenizers.load(path)
    twin, library = hugging_face_twin(path, tokenizer, texts), tokenizer.library.split()[0]
    name = f"encode_{Path(path).name}_vs_"
    peers = {name + library: (library, lambda: encode(tokenizer, texts))}
    if twin:
        peers[name + "tokenizers"] = ("tokenizers", lambda: sum(map(len, twin.encode_batch_fast(
            texts, add_special_tokens=False))))
    return versus("MB/s", sum(len(utf8(t)) for t in texts) / 1e6, lambda: sum(map(len, tokenizer.encode_batch(texts))),
                  peers, min(3, rounds))


def datatrove_run(folder, *pipelines) -> dict:
    """Each (steps, tasks) by datatrove's local executor with one worker; the last step's statistics."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.utils.logging import logger
    logger.disable("datatrove")
    for steps, tasks in pipelines:
        stats = LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=tempfile.mkdtemp(dir=folder)).run()
    return stats.stats[-1].stats


def datatrove_words():
    """Words for datatrove split at white space, as dedup.py's are: spaCy's, its default for English, take longer."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text):
            return text.split()

        def span_tokenize(self, text):
            return [match.span() for match in clean.SENTENCE_END.finditer(text)] or [(0, len(text))]

        def sent_tokenize(self, text):
            return [text[a:b] for a, b in self.span_tokenize(text)]
    return Words()


def bench_cleaning(documents, folder, rounds) -> list:
    """clean.py's web preset from a jsonl file to kept.jsonl, dropped.jsonl.gz and drops.json on one core, against
    datatrove from jsonl to jsonl with the filters of the same rules (Gopher, C4 as FineWeb uses it, FineWeb) and its
    PIIFormatter, and against datasets.map, filter and to_json around the same clean_document.

    datatrove stops at the first rule that a document breaks and writes nothing of it. Ours takes every score of every
    document, repairs Unicode, drops boilerplate, guesses the language and looks for more kinds of personal data. C4's
    list of bad words, which would have to be fetched, is on neither side.
    """
    source, settings = write_jsonl(folder / "clean/documents.jsonl", documents), clean.Settings("web")

    def datatrove():
        from datatrove.pipeline import filters
        from datatrove.pipeline.formatters import PIIFormatter
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.writers import JsonlWriter
        language = datatrove_words()
        return datatrove_run(folder, ([
            JsonlReader(str(source.parent)), filters.GopherRepetitionFilter(language=language),
            filters.GopherQualityFilter(language=language), filters.C4QualityFilter(filter_no_terminal_punct=False,
                                                                                     language=language),
            filters.FineWebQualityFilter(language=language), PIIFormatter(),
            JsonlWriter(tempfile.mkdtemp(dir=folder), compression=None)], 1))["total"].total

    def by_datasets():
        import datasets
        datasets.disable_progress_bars()

        def step(record):
            part = clean.clean_document({**record, "metadata": {}}, settings)[0]
            scores = part["metadata"]["scores"]
            scores["quality"] = clean.quality(scores)
            return {"text": part["text"], "kept": not clean.broken(scores, clean.PRESETS["web"])}
        cache = tempfile.mkdtemp(dir=folder)
        raw = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
        kept = raw.map(step).filter(lambda record: record["kept"])
        kept.to_json(f"{cache}/kept.jsonl")
        return len(kept)

    def ours():
        return clean.run(clean.read_records(str(source)), settings, folder / "cleaned", overwrite=True)["kept"]

    megabytes = sum(len(utf8(t)) for t in documents) / 1e6
    return versus("MB/s", megabytes, ours, {"clean_vs_datatrove": ("datatrove", datatrove),
                                            "clean_vs_datasets": ("datasets", by_datasets)},
                  min(3, rounds), documents=len(documents), megabytes=megabytes)


def with_copies(documents) -> list:
    """The documents and a copy of every third: as it is, in other lines, in capitals, with 1 or 2 % of words new."""
    rng = random.Random(0)

    def edited(text, share):
        return " ".join(f"new{rng.randrange(1000)}" if rng.random() < share else word for word in text.split(" "))
    ways = [str, lambda t: "\n".join(t.split()), str.upper, lambda t: edited(t, 0.01), lambda t: edited(t, 0.02)]
    out = documents + [ways[i % 5](text) for i, text in enumerate(documents[::3])]
    rng.shuffle(out)
    return out


def bench_dedup(documents, folder, rounds) -> list:
    """Near-duplicates on one core: from jsonl to jsonl against datatrove's four stages and datasketch, and in memory
    against datasketch; all with the words of dedup.normalise, sets of 5-word shingles, 14 bands of 8 hashes.

    Ours decides each proposed pair by its true Jaccard similarity, 0.8 or more, keeps the best and lists what it
    removed. The peers believe the bands; datatrove also joins chains of pairs, and writes the kept alone.
    """
    source, size = write_jsonl(folder / "dedup/documents.jsonl", documents), dedup.BANDS * dedup.ROWS

    def datatrove():
        from datatrove.pipeline.dedup import minhash
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.writers import JsonlWriter
        from datatrove.utils.text import TextNormConfig
        from xxhash import xxh64_intdigest
        words = TextNormConfig(remove_punctuation=False, norm_numbers=False, norm_unicode_diacritics=False)
        config = minhash.MinhashConfig(dedup.SHINGLE, dedup.BANDS, dedup.ROWS, norm_config=words)
        signed, pairs, removed, out = (tempfile.mkdtemp(dir=folder) for _ in range(4))
        sign = minhash.MinhashDedupSignature(signed, config, language=datatrove_words())
        sign._hash_func = lambda gram: xxh64_intdigest(gram.encode())         # its own, but xxhash 4 takes bytes alone
        return datatrove_run(
            folder, ([JsonlReader(str(source.parent)), sign], 1),
            ([minhash.MinhashDedupBuckets(signed, pairs, config=config)], dedup.BANDS),
            ([minhash.MinhashDedupCluster(pairs, removed, config)], 1),
            ([JsonlReader(str(source.parent)), minhash.MinhashDedupFilter(removed),
              JsonlWriter(out, compression=None)], 1))["total"].total

    def sketched(texts):
        """Numbers of the texts that stay."""
        from datasketch import MinHash, MinHashLSH
        index, kept = MinHashLSH(num_perm=size, params=(dedup.BANDS, dedup.ROWS)), []
        for i, text in enumerate(texts):
            words, sketch = dedup.normalise(text).split(" "), MinHash(num_perm=size)
            sketch.update_batch({" ".join(words[j:j + dedup.SHINGLE]).encode()
                                 for j in range(max(len(words) - dedup.SHINGLE + 1, 1))})
            if not index.query(sketch):
                index.insert(i, sketch)
                kept.append(i)
        return kept

    def datasketch():
        records = [record for _, record in read_records(str(source))]
        kept = sketched([record["text"] for record in records])
        (folder / "kept.jsonl").write_text("".join(json.dumps(records[i]) + "\n" for i in kept), encoding="utf-8")
        return len(kept)

    def in_memory():
        """dedup.py's functions without its files."""
        texts, sets, keys = sorted(documents, key=len, reverse=True), [], []              # best first
        for i in range(0, len(texts), 64):
            grams = dedup.ngram_hashes([dedup.normalise(t) for t in texts[i:i + 64]], dedup.SHINGLE)
            sets += map(np.unique, grams)
            keys.append(dedup.band_keys(grams))
        members, groups = zip(*map(dedup.link, np.concatenate(keys).T))
        kept, _, _ = dedup.verdict(list(members), list(groups), len(texts), sets.__getitem__, 0.8)
        return int((kept == np.arange(len(texts))).sum())

    common = {"documents": len(documents), "megabytes": sum(len(utf8(t)) for t in documents) / 1e6}
    return versus(
        "documents/s", len(documents), lambda: dedup.dedup([source], folder / "deduped", overwrite=True)["kept"],
        {"dedup_vs_datatrove": ("datatrove", datatrove), "dedup_vs_datasketch": ("datasketch", datasketch)},
        min(3, rounds), **common) + versus(
        "documents/s", len(documents), in_memory,
        {"dedup_in_memory_vs_datasketch": ("datasketch", lambda: len(sketched(documents)))}, min(3, rounds), **common)


def datasets_pipeline(twin, source, folder, processes=None) -> float:
    """Seconds of what transformers' run_clm.py does: the fast tokenizer in a batched map, then group_texts."""
    import datasets
    import transformers
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    context, peer = 1024, transformers.PreTrainedTokenizerFast(tokenizer_object=twin)

    def group_texts(batch):
        joined = {k: list(itertools.chain(*batch[k])) for k in batch}
        length = len(joined["input_ids"]) // context * context
        result = {k: [t[i:i + context] for i in range(0, length, context)] for k, t in joined.items()}
        result["labels"] = result["input_ids"].copy()
        return result

    cache = tempfile.mkdtemp(dir=folder)
    start = time.perf_counter()
    raw = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
    encoded = raw.map(lambda batch: peer(batch["text"]), batched=True, remove_columns=raw.column_names,
                      num_proc=processes)
    encoded.map(group_texts, batched=True, num_proc=processes)
    return time.perf_counter() - start


def bench_reading(folder, rounds) -> list:
    """Batches at T = 2048 from mapped shards in random order, with labels, positions and document starts. Peers:
    nanoGPT's get_batch (tokens alone), rows of T + 1 tokens of a mapped dataset in torch's format (tokens alone), and
    datatrove's DatatroveFileDataset, which is made for the order of the file (tokens and positions)."""
    shards, T, B, steps = Shards(folder / "shards"), 2048, 64, 20
    plan = np.arange(steps * (rounds + 1) + 2, dtype=np.int64)[:, None] * B
    loader = data.Loader(pack_sources({"text": shards}, DataConfig(context=T)), plan, seed=0)
    tokens = np.memmap(folder / "shards" / f"{shards.records[0]['name']}.bin", shards.dtype, "r", offset=HEADER_BYTES)
    rng, step, windows = np.random.default_rng(0), itertools.count(), max(1, len(tokens) // (T + 1))

    def get_batch():
        for _ in range(steps):
            index = rng.integers(0, len(tokens) - T - 1, B)
            torch.stack([torch.from_numpy(tokens[i:i + T].astype(np.int64)) for i in index])
            torch.stack([torch.from_numpy(tokens[i + 1:i + 1 + T].astype(np.int64)) for i in index])

    @functools.cache
    def dataset():
        import datasets
        cut = tokens[:windows * (T + 1)].reshape(windows, -1)
        datasets.Dataset.from_dict({"input_ids": cut}).save_to_disk(folder / "rows")
        return datasets.load_from_disk(folder / "rows").with_format("torch")

    @functools.cache
    def file():
        from datatrove.utils.dataset import DatatroveFileDataset
        tokens.tofile(folder / "tokens.ds")
        shards.end_maps[0].tofile(folder / "tokens.ds.index")
        return DatatroveFileDataset(str(folder / "tokens.ds"), T, shards.dtype.itemsize, return_positions=True)

    def in_order():
        for s in range(steps):
            rows = [file()[i % windows] for i in range(s * B, (s + 1) * B)]
            for name in ("input_ids", "positions"):
                torch.stack([r[name] for r in rows])

    def ours():
        for _ in range(steps):
            loader.batch(next(step))

    def random_rows():
        for _ in range(steps):
            dataset()[rng.integers(0, windows, B)]

    return versus("M tokens/s", steps * B * T / 1e6, ours, {
        "read_mtokens_per_second": ("nanoGPT get_batch", get_batch), "read_vs_datasets": ("datasets", random_rows),
        "read_vs_datatrove": ("datatrove", in_order)}, rounds)


# ---- train

MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2}
CASES = {   # vocabulary, context, rows, documents of mixed length
    "vocab_8k": (8192, 512, 8, False),
    "vocab_32k": (32768, 512, 8, False),
    "packed_2k": (8192, 2048, 2, True),
    "tiny": (512, 64, 2, False),                # for the tests
}
OURS, PEERS = ("ours", "materialised", "lora", "qlora"), ("transformers", "peft")
SIDES = (*OURS, *PEERS, *(f"{peer}_allocator" for peer in PEERS))
RANK, ALPHA = 8, 16


def case_batches(case, count, seed=0):
    """Random tokens [rows, T + 1]; packed rows hold documents of 32 to 640 tokens."""
    vocab, T, rows, packed = CASES[case]
    rng, out = np.random.default_rng(seed), []
    for _ in range(count):
        tokens = torch.from_numpy(rng.integers(0, vocab, (rows, T + 1)).astype(np.int32))
        doc_start = np.zeros((rows, T + 1), np.int32)
        for r in range(rows if packed else 0):
            at = 0
            while at < T + 1:
                length = int(np.exp(rng.uniform(np.log(32), np.log(640))))
                doc_start[r, at:at + length] = at
                at += length
        doc_start = torch.from_numpy(doc_start)
        positions = torch.arange(T + 1, dtype=torch.int32) - doc_start
        out.append(data.Batch(tokens, tokens, positions, doc_start, np.zeros(rows, np.int64), None))
    return out


def worker(args):
    """One side of one case in a process of its own: for each line on stdin it does a step, or a step's matrix products
    alone, and prints the seconds; at the end {"losses", "peak_bytes", ...} as JSON."""
    vocab, T, rows, packed = CASES[args.case]
    side, _, allocator = args.side.partition("_")
    if side in OURS or allocator:
        parallel.start(args.device)
    config = ModelConfig(vocab_size=vocab, max_position_embeddings=T, tie_word_embeddings=False, **MODEL)
    objective, optim_config = Causal(mask_documents=packed), OptimConfig(lr=1e-4, min_lr=0)
    batches, result, rates = [objective.corrupt(b, None) for b in case_batches(args.case, 8)], {"losses": []}, None
    for b in batches:
        b.labels[:, -1] = IGNORE
    model = Model(config)
    model.initialise(0)
    if side in ("lora", "qlora", "peft"):
        rates, optim_config.lr = adapt(model, side == "qlora"), 1e-3
        result["held"] = held(model)
    if side in OURS:
        model.to(args.device)
        prepared, optimizer = [b.to(args.device) for b in batches], make_optimizer(model, optim_config, rates)

        def step(batch):
            if side == "materialised":              # the same model with all its logits
                logits = model.head(model(batch.tokens, batch.position_ids))
                loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten().long())
            else:
                loss, n, _ = objective.loss(model, batch)
                loss = loss / n
            loss.backward()
            return loss.item()
    else:
        model, result["peer"] = peer_of(model, side)
        model.to(args.device).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=optim_config.lr,
                                      betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        prepared = [b.tokens.long().to(args.device) for b in batches]

        def step(tokens):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            return loss.item()
    number = 0
    for line in sys.stdin:                          # an answer for each line that comes in
        if line.strip() == "products":
            print(time_products(config, rows * T, T, args.device), flush=True)
            continue
        start = time.perf_counter()
        result["losses"].append(step(prepared[number % len(prepared)]))
        number += 1
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number <= 3:                             # before anything but steps has asked for memory
            result["peak_bytes"] = peak_bytes(torch.device(args.device))
        print(time.perf_counter() - start, flush=True)
    print(json.dumps(result))
    return 0


@torch.no_grad()
def adapt(model, quantised: bool) -> dict:
    """Give the model an adapter on every linear layer of its blocks; -> the learning rates' multiples. Both of its
    matrices are random: with B = 0, as training starts, a first loss would not tell one adapter from another."""
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, base="nf4" if quantised else "plain")
    lora.attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.normal_(0, 0.1, generator=generator)
    return lora.lr_scales(model, config)


def held(model) -> dict:
    """Bytes of the base's weights, and of its 4-bit matrices: as held, and by arithmetic, 4 bits a number, 8 for each
    64 of them, 32 for each 64 * 256, and the tables of 16 and 256 levels and an offset, 1,092 bytes a matrix."""
    four = [layer.quantised for _, layer in adapted_layers(model) if layer.quantised is not None]
    sizes = [record.shape.numel() for record in four]
    return {"base_bytes": sum(x.nbytes for name, x in model.state_dict().items() if ".adapters." not in name),
            "quantised_numbers": sum(sizes),
            "quantised_bytes": sum(x.nbytes for record in four for x in record.buffers()),
            "arithmetic_bytes": sum(math.ceil(n / 2) + math.ceil(n / 64) + 4 * math.ceil(n / (64 * 256)) + 1092
                                    for n in sizes)}


def peer_of(model, side: str):
    """-> (transformers' model with the weights of ours, and PEFT's adapter with those of ours; who that is)."""
    import transformers
    who = f"transformers {transformers.__version__}"
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf.write_config(model.config, torch.float32, {})))
    peer.load_state_dict({hf.to_hf_name(k): v for k, v in model.state_dict().items() if ".adapters." not in k})
    if side == "peft":
        import peft
        who = f"peft {peft.__version__} on {who}"
        peer = peft.get_peft_model(peer, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                                                         task_type="CAUSAL_LM"))
        peft.set_peft_model_state_dict(peer, peft_files.peft_state(model))
    return peer, who


@torch.no_grad()
def time_products(config, N, T, device) -> float:
    """Seconds of one step's matrix products alone, on its shapes: three a weight, and attention's at half their full
    squares (causal): two forward, five backward (one of them recomputed)."""
    D, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(D, q), (D, kv), (D, kv), (q, D), (D, F), (D, F), (F, D)]
    total = 0.0
    for n, (i, o) in [(config.num_hidden_layers, s) for s in shapes] + [(1, (D, config.vocab_size))]:
        chunk = kernels.cross_entropy.chunk_rows(N, 4 * o, torch.device(device)) if o == config.vocab_size else N
        x, w, dy = (torch.randn(*s, device=device) for s in ((chunk, i), (o, i), (chunk, o)))
        y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)

        def products(x=x, w=w, dy=dy, y=y, dx=dx, dw=dw):
            torch.mm(x, w.T, out=y)
            torch.mm(dy, w, out=dx)
            torch.mm(dy.T, x, out=dw)
        total += n * N / chunk * timed(products)
    shape = (N // T * config.num_attention_heads, T, config.head_dim)
    a, b = torch.randn(shape, device=device), torch.randn(shape, device=device).transpose(1, 2).contiguous()
    square, out = a @ b, torch.empty_like(a)
    attention = 3 * timed(lambda: torch.bmm(a, b, out=square)) + 4 * timed(lambda: torch.bmm(square, a, out=out))
    return total + config.num_hidden_layers * attention / 2


def timed(f, repeats: int = 3) -> float:
    f()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_turn(case: str, sides: tuple, steps: int, device: str, products: str = ""):
    """-> ({side: seconds of each step}, {side: what its worker reported}, [(seconds of the products, of a step)]).

    All sides stay loaded and take their steps in turn, so that what else the machine does hits them alike.
    """
    workers = {side: subprocess.Popen(
        [sys.executable, __file__, "worker", "--case", case, "--side", side, "--device", device],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for side in sides}

    def ask(side, what):
        print(what, file=workers[side].stdin, flush=True)
        if not (answer := workers[side].stdout.readline()):
            raise ValueError(f"the {side} side of {case} failed; its error stands above")
        return float(answer)

    seconds, results, shares = {side: [] for side in sides}, {}, []
    for side in sides:                                       # the first step warms up
        ask(side, "step")
    for number in range(steps):
        for side in sides if number % 2 else sides[::-1]:
            seconds[side].append(ask(side, "step"))
    for side, process in workers.items():
        if side == products:
            shares = [(ask(side, "products"), ask(side, "step")) for _ in range(3)]
        process.stdin.close()
        results[side] = json.loads(process.stdout.read())
        process.wait()
    return seconds, results, shares


def rate_rows(name, case, sides, seconds, results, **more) -> list:
    """Tokens per second of sides[0] against those of the peer sides[1], and of sides[2], the peer with our setting of
    the allocator."""
    vocab, T, batch, packed = CASES[case]
    rate = [batch * T / statistics.median(seconds[side]) for side in sides]
    peer = results[sides[1]]["peer"]
    return [row(name, "tokens/s", *rate[:2], peer, context=T, rows=batch, packed=packed,
                spread=spread([b / a for a, b in zip(*(seconds[side] for side in sides[:2]))]),
                first_loss=[results[side]["losses"][0] for side in sides], model={**MODEL, "vocab_size": vocab},
                **more),
            row(f"{name}_their_allocator_too", "tokens/s", rate[0], rate[2], peer)]


def bench_train(args) -> list:
    rows, share = [], None
    sides = ("ours", "transformers", "transformers_allocator")
    for case in ("vocab_8k", "vocab_32k", "packed_2k"):
        seconds, results, products = in_turn(case, sides, args.steps, args.device,
                                             "ours" if case == "vocab_32k" else "")
        rows += rate_rows(case, case, sides, seconds, results)
        if case == "vocab_32k":
            rows.append(row("peak_memory_32k", "bytes", *(results[side]["peak_bytes"] for side in sides[:2]),
                            results["transformers"]["peer"]))
            share = statistics.median(p / s for p, s in products)
    rows.append(row("matmul_share", "of the step is its matrix products at the machine's own rate", share))
    return rows


def bench_lora(args) -> list:
    """LoRA at 32,768 ids against PEFT, the same adapters and batches, and against itself on a base in NF4 with double
    quantisation, which covers the blocks: embedding and head, here the most, stay as they are. On a CPU each product
    with a 4-bit weight turns it into fp32 first."""
    case, sides = "vocab_32k", ("lora", "peft", "peft_allocator")
    seconds, results, _ = in_turn(case, (*sides, "qlora"), args.steps, "cpu")
    losses = {side: results[side]["losses"] for side in results}
    for step, limit in ((0, 1e-5), (-1, 1e-4)):
        if not math.isclose(losses["lora"][step], losses["peft"][step], rel_tol=limit):
            raise ValueError(f"the two sides do not train the same: the losses of step {step} are "
                             f"{losses['lora'][step]} and {losses['peft'][step]}")
    peak = {side: results[side]["peak_bytes"] for side in results}
    peer, own = results["peft"]["peer"], "LoRA, fp32 base"
    rows = rate_rows("lora", case, sides, seconds, results, rank=RANK, losses=losses)
    rows += [row("lora_peak_memory", "bytes", peak["lora"], peak["peft"], peer),
             row("lora_peak_memory_their_allocator_too", "bytes", peak["lora"], peak["peft_allocator"], peer)]
    four, whole = results["qlora"]["held"], results["lora"]["held"]
    _, T, batch, _ = CASES[case]
    rate = [batch * T / statistics.median(seconds[side]) for side in ("qlora", "lora")]
    return rows + [
        row("qlora", "tokens/s", *rate, own, spread=spread([b / a for a, b in zip(seconds["qlora"], seconds["lora"])])),
        row("qlora_memory", "bytes of base weights", four["base_bytes"], whole["base_bytes"], own, **four),
        row("qlora_matrix_memory", "bytes of its 4-bit matrices", four["quantised_bytes"],
            4 * four["quantised_numbers"], own, bits=8 * four["quantised_bytes"] / four["quantised_numbers"]),
        row("qlora_peak_memory", "bytes", peak["qlora"], peak["lora"], own)]


# ---- kernels

def bench_kernels(args) -> list:
    if torch.cuda.is_available():
        return kernel_times(args)
    parallel.keep_freed_memory()                     # for both sides: else the page faults of each tensor are timed
    return static_rows() + cpu_rows(args.rounds) + logits_rows(args.rounds)


def static_rows() -> list:
    """A row a kernel function and architecture: the largest figures of the variants that ship, which are listed."""
    compiled = measure.compile_all()
    measure.print_static(compiled)
    rows = {}
    for found in compiled:
        rows.setdefault((f"{found['module']}.{found['kernel']}", found["arch"]), []).append(found)
    return [{"name": name, "unit": "registers", "ours": max(v["registers"] for v in variants), "peer": None,
             "peer_name": None, "ratio": None, "arch": arch,
             **{key: max(v[key] for v in variants) for key in ("registers", "spill_bytes", "shared_bytes")},
             "occupancy": min(v["occupancy"] for v in variants), "variants": variants,
             "faults": [fault for v in variants for fault in measure.faults(v)]}
            for (name, arch), variants in rows.items()]


def cpu_cases() -> dict:
    """{name: (our op, the plain way, inputs)} at sizes of a small model on a CPU, fp32."""
    def normal(*shape):
        return torch.randn(shape, requires_grad=True)

    def turn(x, cos, sin):
        cos, sin = (torch.cat([a, a], -1).unsqueeze(2) for a in (cos, sin))
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def dense(q, k, v, doc_start):
        mask = interval_mask(q.shape[1], k.shape[1], True, None, doc_start)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)

    T, D, H, K, d = 2048, 1024, 8, 4, 64
    angle = torch.rand(1, T, d // 2)
    doc_start = (torch.arange(T, dtype=torch.int32) // 256 * 256)[None]
    labels = torch.randint(0, 32768, (T,))
    return {
        "cpu_rmsnorm": (lambda x, w: kernels.rmsnorm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (D,), w, 1e-5),
                        (normal(T, D), normal(D))),
        "cpu_add_rmsnorm": (lambda x, r, w: kernels.add_rmsnorm(x, r, w, 1e-5),
                            lambda x, r, w: (F.rms_norm(x + r, (D,), w, 1e-5), x + r),
                            (normal(T, D), normal(T, D), normal(D))),
        "cpu_swiglu": (kernels.swiglu, lambda g, u: F.silu(g) * u, (normal(T, 2752), normal(T, 2752))),
        "cpu_rope": (kernels.rope, lambda q, k, cos, sin: (turn(q, cos, sin), turn(k, cos, sin)),
                     (normal(1, T, H, d), normal(1, T, K, d), angle.cos(), angle.sin())),
        "cpu_attention_documents": (lambda q, k, v, s: kernels.attention(q, k, v, doc_start=s), dense,
                                    (normal(1, T, H, d), normal(1, T, K, d), normal(1, T, K, d), doc_start)),
        "cpu_linear_cross_entropy_32k": (lambda x, w, y: kernels.linear_cross_entropy(x, w, y)[0],
                                         lambda x, w, y: F.cross_entropy(x @ w.T, y, reduction="sum"),
                                         (normal(T, 256), (normal(32768, 256) / 16).detach().requires_grad_(), labels)),
    }


def cpu_rows(rounds: int) -> list:
    """Milliseconds of a forward and backward pass on the CPU, both ways in turn."""
    rows = []
    for name, (ours, plain, inputs) in cpu_cases().items():
        _, upstream = measure.run(ours, inputs)
        upstreams = {ours: upstream, plain: measure.run(plain, inputs)[1]}
        times = {ours: [], plain: []}
        for _ in range(rounds):
            for op, taken in times.items():
                start = time.perf_counter()
                measure.run(op, inputs, upstreams[op])
                taken.append(1000 * (time.perf_counter() - start))
        rows.append(row(name, "ms", *(statistics.median(t) for t in times.values()), "plain PyTorch",
                        spread=spread(times[ours])))
    return rows


def logits_rows(steps: int) -> list:
    """Training at 32,768 ids with the fused linear cross-entropy, and with the logits of all rows at once."""
    seconds, results, _ = in_turn("vocab_32k", ("ours", "materialised"), steps, "cpu")
    assert math.isclose(*(r["losses"][0] for r in results.values()), rel_tol=1e-5), results
    ours, theirs = (statistics.median(s) for s in seconds.values())
    _, T, batch, _ = CASES["vocab_32k"]
    return [row("cpu_training_32k", "tokens/s", batch * T / ours, batch * T / theirs, "materialised logits",
                spread=spread([b / a for a, b in zip(*seconds.values())])),
            row("cpu_training_32k_peak_memory", "bytes", *(r["peak_bytes"] for r in results.values()),
                "materialised logits")]


def kernel_peers() -> dict:
    """{first word of a case's name: {name: op with our arguments}} beyond PyTorch's own: what is installed."""
    peers = {"attention": {"flex": BACKENDS["flex"]}}
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return peers
    doubled = {}                                        # its layout of the angles, made once

    def rope(q, k, cos, sin):
        if cos.data_ptr() not in doubled:
            doubled[cos.data_ptr()] = [torch.cat([a, a], -1).to(q.dtype) for a in (cos, sin)]
        q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *doubled[cos.data_ptr()])
        return q.transpose(1, 2), k.transpose(1, 2)
    liger = {"rmsnorm": lambda x, w, eps: LigerRMSNormFunction.apply(x, w, eps, 0.0, "llama", False),
             "add_rmsnorm": lambda x, r, w, eps: LigerFusedAddRMSNormFunction.apply(x, r, w, eps, 0.0, "llama", False),
             "rope": rope, "swiglu": LigerSiLUMulFunction.apply,
             "cross_entropy": lambda x, w, y: LigerFusedLinearCrossEntropyFunction.apply(
                 x, w, y.long(), None, None, -100, 0.0, 0.0, "sum")[0]}
    return peers | {name: {"liger": op} for name, op in liger.items()}


def kernel_times(args) -> list:
    """Every case of every kernel on this GPU; what the time does not suffice for is named. The rows so far are on disk
    after each case."""
    end, peers, limits = time.monotonic() + args.seconds, kernel_peers(), measure.device_limits()
    rows, found = [row(name, name, value) for name, value in limits.items()], []
    todo = [(name, case, n) for n in args.tokens for name in measure.MODULES
            for case in importlib.import_module(f"kernels.{name}").cases()]
    for module, case, n in todo:
        if time.monotonic() > end:
            print(f"no time left for {case.name} at {n} tokens")
            rows.append({"name": f"{case.name} {n}", "unit": "ms", "ours": None, "peer": None, "peer_name": None,
                         "ratio": None, "left_out": f"{args.seconds:.0f} seconds were up"})
            continue
        timed_rows = measure.time_case(case, n, limits, peers.get(case.name.split()[0], {}))
        measure.print_times(timed_rows)
        found += timed_rows
        for t in timed_rows:
            best = min(((ms, name) for name, ms in t["ms"].items() if name != "triton"), default=(None, None))
            ours = t["ms"].get("triton")
            rows.append({"name": f"{case.name} {n} {t['pass']}", "unit": "ms", "ours": ours, "peer": best[0],
                         "peer_name": best[1], "ratio": ours / best[0] if ours and best[0] else None,
                         "module": module, **t})
        write(args, rows)
    if args.json and found:
        plot_times(found, Path(args.json).with_suffix(".png"))
    return rows


def plot_times(found: list, picture: Path):
    """A bar a provider and case: the share of what this device can do at most."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = sorted({name for t in found for name in t["ms"]})
    figure, axes = plt.subplots(figsize=(10, 0.35 * len(found) + 2))
    for i, name in enumerate(names):
        at = [(y + 0.8 * i / len(names), t["floor_ms"] / t["ms"][name]) for y, t in enumerate(found) if name in t["ms"]]
        axes.barh([y for y, _ in at], [share for _, share in at], 0.8 / len(names), label=name)
    axes.set_yticks(range(len(found)), [f"{t['case']} {t['tokens']} {t['pass']}" for t in found])
    axes.invert_yaxis()
    axes.set_xlabel("share of the device's measured limit")
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, bbox_inches="tight")
    plt.close(figure)


# ---- everything that needs a GPU

STEPS = {   # a Hugging Face config's sizes, vocabulary, context, rows
    "8b": ({"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8}, 128256, 8192, 1),
    "1b": ({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "tie_word_embeddings": True}, 128256, 8192, 2),
    "tiny": ({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2}, 512, 64, 2),
}


def bench_gpu(args) -> list:
    """Tests, training steps and the kernel table, each in a process of its own, so that none takes another down; the
    table gets what time is left."""
    if not torch.cuda.is_available():
        raise ValueError("bench.py gpu needs a CUDA device; bench.py kernels says what can be known without one")
    end, rows, here = time.monotonic() + 60 * args.minutes, [], Path(__file__).parent
    out = Path(args.json).with_suffix("") if args.json else Path("out/gpu")
    out.mkdir(parents=True, exist_ok=True)
    for size in ("8b", "1b"):
        rows += stage(["step", "--size", size], out / f"{size}.json", 90)
        write(args, rows)
    many = ["-n", str(min(8, os.cpu_count()))] if importlib.util.find_spec("xdist") else []
    files = [str(path) for path in [*sorted(here.glob("tests/test_kernel*.py")), here / "tests/test_generate.py"]]
    tests = subprocess.Popen([sys.executable, "-m", "pytest", "-v", "-m", "gpu or kernel", *many, *files], cwd=here,
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    rows.append(test_row(tests, 60 * args.minutes / 3))
    write(args, rows)
    left = end - time.monotonic() - 45
    rows += stage(["kernels", "--tokens", "8192", "--seconds", f"{left:.0f}"], out / "kernels.json", left + 40)
    return rows


def stage(words: list[str], out: Path, limit: float) -> list:
    """The rows of another bench.py command, those that it had written if it failed, and then a row that says how."""
    out.unlink(missing_ok=True)
    try:
        done = subprocess.run([sys.executable, __file__, *words, "--json", str(out)], timeout=limit).returncode
    except subprocess.TimeoutExpired:
        done = f"{limit:.0f} seconds were up"
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    if done == 0:
        return rows
    return [*rows, {"name": " ".join(words), "unit": "", "ours": None, "peer": None, "peer_name": None, "ratio": None,
                    "failed": f"exit status {done}" if isinstance(done, int) else done}]


def test_row(process, limit: float) -> dict:
    """How many tests had which outcome, also where the time was up, and the last lines where something failed."""
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        out += f"\n{limit:.0f} seconds were up\n"
    counts = {word.lower(): len(re.findall(rf"\b{word}\b", out)) for word in ("PASSED", "FAILED", "SKIPPED", "ERROR")}
    made = row("gpu_tests", "passed", counts["passed"], counts=counts, exit_status=process.returncode)
    if process.returncode:
        print(out[-6000:])
        made["failed"] = out[-6000:]
    return made


def bench_step(args) -> list:
    """A full training step on random tokens: forward, loss, backward, clipping, AdamW; ours, or transformers' with
    torch's fused AdamW (bf16 moments); if the card does not hold that, it says so."""
    sizes, vocab, T, B = STEPS[args.size]
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=vocab, max_position_embeddings=T, rope_theta=500000.0, **sizes)
    flops = matmul_flops_per_token(config, T) * B * T
    rate = measure.device_limits()["bf16_tflops"] if cuda else None
    rows, sides = [], ["ours"] if args.size == "8b" else ["ours", "transformers"]
    found = {}
    for side in sides:
        try:
            found[side] = time_steps(side, args.size, config, B, T, device, args.steps)
        except (torch.cuda.OutOfMemoryError, ImportError) as error:          # of the peer: ours stand
            if side == "ours":
                raise
            found[side] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    for name, unit in (("tokens_per_second", "tokens/s"), ("peak_bytes", "bytes")):
        peer = found.get("transformers", {}).get(name)
        rows.append(row(f"step_{args.size}_full_{name}", unit, found["ours"][name], peer, peer and "transformers"))
    rows[0] |= {"context": T, "rows": B, "sides": found, "parameters": found["ours"]["parameters"]}
    if rate:
        done = flops * found["ours"]["tokens_per_second"] / (B * T) / 1e12
        rows.append(row(f"step_{args.size}_full_matrix_rate", "TFLOP/s", done, rate, "8192 x 8192 product"))
    return rows


def time_steps(side, size, config, B, T, device, steps) -> dict:
    """Medians over steps after two that warm up; the same random batch each time, so that the loss must fall.

    8B in full needs about 100 GB: a smaller card recomputes each block in the backward pass, which is reported.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with device:
        torch.set_default_dtype(torch.bfloat16)
        if side == "ours":
            model = Model(config)
        else:
            import transformers
            same = {**STEPS[size][0], "vocab_size": config.vocab_size, "rope_theta": config.rope_theta}
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(**same, max_position_embeddings=T))
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), device=device, dtype=torch.int32)
    batch = data.Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(T, device=device).expand(B, T), None, None, None)
    objective, seconds, losses = Causal(mask_documents=False), [], []
    small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < 110e9
    recompute = size == "8b" and small
    if side == "ours":
        model.checkpoint_blocks = recompute
        optimizer = make_optimizer(model, OptimConfig(name="adamw_8bit", lr=1e-4, min_lr=0.0))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(steps + 2):
        start = time.perf_counter()
        if side == "ours":
            loss, n, _ = objective.loss(model, batch)
            loss = loss / n
        else:
            loss = model(input_ids=tokens[:, :-1].long(), labels=tokens[:, :-1].long()).loss
        loss.backward()
        if side == "ours":                         # the clipping is a factor in the optimizer's kernel
            norm = kernels.grad_norm([p.grad for p in model.parameters()])
            optimizer.step(grad_scale=(1.0 / (norm + 1e-6)).clamp(max=1.0).view(1))
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())                 # waits for the device
        seconds.append(time.perf_counter() - start)
    return {"tokens_per_second": B * T / statistics.median(seconds[2:]), "peak_bytes": peak_bytes(device),
            "losses": losses, "recompute": recompute, "spread": spread(seconds[2:]),
            "parameters": sum(p.numel() for p in model.parameters())}


def write(args, rows: list):
    """The rows, and where they come from, into the file that --json names."""
    if args.json:
        result = {"machine": machine(), "command": [Path(word).name if "/" in word else word for word in sys.argv[1:]],
                  "rows": rows}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def default_text() -> list[str]:
    corpora = os.environ.get("NANOCPT_DATA", "") + "/corpora"
    real = [f"{corpora}/{name}" for name in ("wikitext2/wiki.test.raw", "legal_en_dc/dc_code_title16.txt",
                                             "legal_en_dc/dc_code_title28.txt",
                                             "tinystories/tinystories_sample_2MiB.txt")]
    return [path for path in real if Path(path).exists()] or [p for p in ["out/demo/general.jsonl"] if Path(p).exists()]


def main():
    parser = ArgumentParser(prog="bench.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ArgumentParser)
    p = commands.add_parser("data", help="from raw text to batches")
    p.add_argument("--text", nargs="+", default=default_text(), metavar="FILE",
                   help="text or .jsonl (default: WikiText-2, law and stories of $NANOCPT_DATA, or the demo's)")
    p.add_argument("--tokenizer", action="append", help="repeatable (default: GPT-2 files trained on the text)")
    p.add_argument("--mbytes", type=float, default=20, help="the text is repeated to about this size (default: 20)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", metavar="FILE")
    p = commands.add_parser("train", help="training steps")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--steps", type=int, default=12, help="steps of each side, in turn (default: 12)")
    p.add_argument("--json", metavar="FILE")
    p = commands.add_parser("lora", help="training steps of an adapter, on a CPU")
    p.add_argument("--steps", type=int, default=12, help="steps of each side, in turn (default: 12)")
    p.add_argument("--json", metavar="FILE")
    p = commands.add_parser("kernels", help="every kernel")
    p.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 16384], help="on a GPU (default: 2k, 8k, 16k)")
    p.add_argument("--seconds", type=float, default=1800, help="on a GPU: begin no case after so long (default: 1800)")
    p.add_argument("--rounds", type=int, default=9, help="on a CPU (default: 9)")
    p.add_argument("--json", metavar="FILE")
    p = commands.add_parser("gpu", help="tests, training steps and kernels on this GPU")
    p.add_argument("--minutes", type=float, default=8, help="for everything (default: 8)")
    p.add_argument("--json", metavar="FILE")
    p = commands.add_parser("step", help="one training step of a whole model, bf16")
    p.add_argument("--size", choices=tuple(STEPS), required=True)
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--json", metavar="FILE")
    p = commands.add_parser("worker")
    p.add_argument("--case", choices=tuple(CASES), required=True)
    p.add_argument("--side", choices=SIDES, required=True)
    p.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.command == "worker":
        return worker(args)
    if args.command == "data" and not args.text:
        raise ValueError("no text to pack: give --text FILE, or run make demo first")
    commands = {"data": bench_data, "train": bench_train, "lora": bench_lora, "kernels": bench_kernels,
                "gpu": bench_gpu, "step": bench_step}
    write(args, commands[args.command](args))
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))

"""From raw text to batches: packing, reading, encoding, cleaning and dedup, each beside its peers on the same files."""

import contextlib
import itertools
import json
import math
import os
import random
import tempfile
import time
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer

import clean
import data
import dedup
import tokenizer as tokenizers
from core.cli import Output, Reading
from core.files import write_text
from measure.bench_rows import compare_in_turn, row
from text import vocabulary
from text.corpus import read_documents, read_input, read_records, utf8
from text.duplicates import BANDS, ROWS, SHINGLE, fold_words
from text.mixture import DataConfig
from text.packing import pack_sources
from text.repair import SENTENCE_END
from text.shards import Shards, pack

TEXTS = ("wikitext2/wiki.test.raw", "legal_en_dc/dc_code_title16.txt", "legal_en_dc/dc_code_title28.txt",
         "tinystories/tinystories_sample_2MiB.txt")


@dataclass
class DataOptions:
    """Time the way from raw text to batches."""
    text: list[str] = field(default_factory=list)
    """Text or .jsonl files. Default: WikiText-2, law and stories of $NANOCPT_DATA, else Python's language reference,
    which is on every machine."""
    tokenizer: list[str] = field(default_factory=list)
    """Tokenizers to pack and encode with. Default: GPT-2 files trained on the text."""
    mbytes: float = 20.0
    """The text is repeated to about this size."""
    rounds: int = 5
    """Rounds that are counted, after one that warms up."""


def bench_data(options: DataOptions) -> list:
    """Packing and reading on all cores, then each stage on one, beside its peers on the same files.

    Cleaning and dedup get documents of about 2,000 characters (blocks of the text joined), a quarter of `mbytes` at
    most and never repeated but for the copies that dedup has to find; the encoders get a quarter of `mbytes`.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder, corpora = Path(folder), Path(os.environ.get("NANOCPT_DATA", "")) / "corpora"
        # The half MB of English that Python's own help() prints.
        write_text(folder / "python.txt", "\n\n".join(topics.values()))
        files = options.text or [str(corpora / name) for name in TEXTS if (corpora / name).exists()]
        texts = [part.strip() for block in read_documents(files or [str(folder / "python.txt")])
                 for part in block.split("<|endoftext|>") if part.strip()]
        size = megabytes(texts)
        joined = max(1, round(0.002 * len(texts) / size))
        documents = ["\n\n".join(texts[i:i + joined]) for i in range(0, len(texts), joined)]
        documents = documents[::math.ceil(4 * size / options.mbytes)]
        texts *= max(1, int(options.mbytes / size))

        source = write_jsonl(folder / "in/corpus.jsonl", texts)
        paths = options.tokenizer or [folder / "tokenizer"]
        if not options.tokenizer:
            # A byte-level BPE as GPT-2's two files.
            (folder / "tokenizer").mkdir()
            own = ByteLevelBPETokenizer()
            own.train_from_iterator(texts[:20000], 8192, special_tokens=["<|endoftext|>"], show_progress=False)
            own.save_model(str(folder / "tokenizer"))
        for path in paths:
            rows += bench_packing(path, source, texts, folder, options.rounds)
        rows += bench_reading(folder, options.rounds)
        few = min(3, options.rounds)
        with one_core():
            real = Path(os.environ.get("NANOCPT_DATA", folder)).glob("tokenizers/*")
            for path in options.tokenizer or [*paths, *sorted(real)]:
                rows += bench_encoding(path, texts[::4], few)
            rows += bench_cleaning(documents, folder, few)
            rows += bench_dedup(with_copies(documents), folder, few)
    return rows


def megabytes(texts) -> float:
    return sum(len(utf8(text)) for text in texts) / 1e6


def write_jsonl(path, texts) -> Path:
    write_text(path, "".join(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(texts)))
    return path


@contextlib.contextmanager
def one_core():
    """Keep this thread, the threads and processes it starts, and the batches of `tokenizers` on one core."""
    cores, setting = os.sched_getaffinity(0), os.environ.get("TOKENIZERS_PARALLELISM", "true")
    os.sched_setaffinity(0, {max(cores)})
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        os.environ["TOKENIZERS_PARALLELISM"] = setting


def load_twin(path, tokenizer, texts):
    """The same tokenizer in `tokenizers`, the library that datasets.map is used with, or None; by 200 texts."""
    if tokenizer.library.startswith("tokenizers"):
        twin = tokenizer.backend
    elif tokenizer.kind == "gpt2":
        twin = ByteLevelBPETokenizer.from_file(f"{path}/vocab.json", f"{path}/merges.txt")._tokenizer
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
    """Pack a jsonl file from disk to disk, everyone with the same tokenizer.

    On all cores against the encoder alone, on the texts in memory, and against datasets.map with group_texts as in
    transformers' run_clm.py. On one core against datatrove's DocumentTokenizer, without its shuffle: pack has none.
    """
    tokenizer = tokenizers.load(path)
    twin = load_twin(path, tokenizer, texts)

    def ours(workers=2):
        manifest = pack(read_documents([str(source)]), tokenizer, folder / "shards", heldout=0.0, workers=workers,
                        overwrite=True)
        return manifest["splits"]["train"]["tokens"]

    def datatrove():
        from datatrove.pipeline.tokens import DocumentTokenizer
        step = DocumentTokenizer(tempfile.mkdtemp(dir=folder), str(folder / "twin.json"), shuffle_documents=False,
                                 eos_token=tokenizer.tokens[tokenizer.eos_id])
        return run_datatrove(folder, step, source=source)["tokens"].total

    def time_datasets(processes) -> float:
        import datasets
        import transformers
        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()
        context, peer = 1024, transformers.PreTrainedTokenizerFast(tokenizer_object=twin)

        def group_texts(batch):
            joined = {k: list(itertools.chain(*batch[k])) for k in batch}
            length = len(joined["input_ids"]) // context * context
            result = {k: [t[i:i + context] for i in range(0, length, context)] for k, t in joined.items()}
            return result | {"labels": result["input_ids"].copy()}

        cache, start = tempfile.mkdtemp(dir=folder), time.perf_counter()
        raw = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=cache)
        raw.map(lambda batch: peer(batch["text"]), batched=True, remove_columns=raw.column_names,
                num_proc=processes).map(group_texts, batched=True, num_proc=processes)
        return time.perf_counter() - start

    which = {"tokenizer": Path(path).name}
    alone = {"pack_vs_encoder": (tokenizer.library, lambda: count_tokens(tokenizer.library, tokenizer.backend, texts))}
    rows = compare_in_turn("tokens/s", None, ours, alone, rounds, **which)
    if twin:
        # datasets has two ways to use the cores; the better one counts.
        seconds = [time_datasets(processes) for processes in (None, os.cpu_count())]
        rows.append(row("pack_vs_datasets", "tokens/s", rows[0]["ours"], rows[0]["counts"]["ours"] / min(seconds),
                        "datasets.map + group_texts", seconds_by_processes=seconds, spread=rows[0]["spread"], **which))
        twin.save(str(folder / "twin.json"))
        with one_core():
            rows += compare_in_turn("tokens/s", None, lambda: ours(1), {"pack_vs_datatrove": ("datatrove", datatrove)},
                                    min(3, rounds), **which)
    return rows


def count_tokens(library: str, backend, texts) -> int:
    """Number of tokens by the library's own batch call, on all cores that this thread may use, and nothing else."""
    if library.startswith("tokenizers"):
        return sum(map(len, backend.encode_batch_fast(texts, add_special_tokens=False)))
    encode = backend.encode if library.startswith("sentencepiece") else backend.encode_ordinary_batch
    return sum(map(len, encode(texts, num_threads=len(os.sched_getaffinity(0)))))


def bench_encoding(path, texts, rounds) -> list:
    """Encode on one core, against the library behind the tokenizer and, if that is another, against `tokenizers`.

    Ours looks for surrogates and gives arrays, theirs gives lists or Encoding objects.
    """
    tokenizer, size = tokenizers.load(path), megabytes(texts)
    twin = load_twin(path, tokenizer, texts)
    backends = {tokenizer.library.split()[0]: tokenizer.backend} | ({"tokenizers": twin} if twin else {})
    peers = {f"encode_{Path(path).name}_vs_{who}": (who, partial(count_tokens, who, backend, texts))
             for who, backend in backends.items()}
    return compare_in_turn("MB/s", size, lambda: sum(map(len, tokenizer.encode_batch(texts))), peers, rounds)


def run_datatrove(folder, *steps, source: Path | None = None, write: bool = False, tasks: int = 1) -> dict:
    """Run steps by datatrove's local executor with one worker; return the last one's statistics.

    The documents of the jsonl file `source` go in. With `write`, jsonl comes out.
    """
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline import readers, writers
    from datatrove.utils.logging import logger
    logger.disable("datatrove")
    before = [readers.JsonlReader(str(source.parent))] if source else []
    after = [writers.JsonlWriter(tempfile.mkdtemp(dir=folder), compression=None)] if write else []
    return LocalPipelineExecutor([*before, *steps, *after], tasks=tasks, workers=1,
                                 logging_dir=tempfile.mkdtemp(dir=folder)).run().stats[-1].stats


def whitespace_words():
    """A tokenizer that splits at white space, as dedup.py does; datatrove's default for English, spaCy, is slower."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        def word_tokenize(self, text):
            return text.split()

        def span_tokenize(self, text):
            return [match.span() for match in SENTENCE_END.finditer(text)] or [(0, len(text))]
        # The base class asks for it; nothing calls it.
        sent_tokenize = span_tokenize
    return Words()


def bench_cleaning(documents, folder, rounds) -> list:
    """Clean on one core: clean.py's web preset from a jsonl file to kept.jsonl, dropped.jsonl.gz and drops.json.

    Against datatrove from jsonl to jsonl with the filters of the same rules (Gopher, C4 as FineWeb uses it, FineWeb)
    and its PIIFormatter, which stops at the first rule that a document breaks and writes nothing of it. Ours takes
    every score of every document, repairs Unicode, drops boilerplate, guesses the language and looks for more kinds of
    personal data. C4's list of bad words, which would have to be fetched, is on neither side.
    """
    source, settings = write_jsonl(folder / "clean/documents.jsonl", documents), clean.Settings("web")

    def datatrove():
        from datatrove.pipeline import filters, formatters
        language = whitespace_words()
        steps = (filters.GopherRepetitionFilter(language=language), filters.GopherQualityFilter(language=language),
                 filters.C4QualityFilter(filter_no_terminal_punct=False, language=language),
                 filters.FineWebQualityFilter(language=language), formatters.PIIFormatter())
        return run_datatrove(folder, *steps, source=source, write=True)["total"].total

    def ours():
        records = read_input([str(source)], Reading())
        return clean.clean_corpus(records, settings, folder / "cleaned", overwrite=True)["kept"]

    size, peers = megabytes(documents), {"clean_vs_datatrove": ("datatrove", datatrove)}
    return compare_in_turn("MB/s", size, ours, peers, rounds, documents=len(documents), megabytes=size)


def with_copies(documents) -> list:
    """The documents and a copy of every third: as it is, in other lines, in capitals, with 1 or 2 % of words new."""
    rng = random.Random(0)

    def edited(share, text):
        return " ".join(f"new{rng.randrange(1000)}" if rng.random() < share else word for word in text.split(" "))
    ways = [str, lambda text: "\n".join(text.split()), str.upper, partial(edited, 0.01), partial(edited, 0.02)]
    out = documents + [way(text) for way, text in zip(itertools.cycle(ways), documents[::3])]
    rng.shuffle(out)
    return out


def bench_dedup(documents, folder, rounds) -> list:
    """Remove near-duplicates on one core, from jsonl to jsonl, against datatrove's four stages and datasketch.

    All use the words of fold_words, sets of 5-word shingles and 14 bands of 8 hashes. Ours decides each proposed pair
    by its true Jaccard similarity, 0.8 or more, keeps the best and lists what it removed. The peers believe the bands;
    datatrove also joins chains of pairs, and writes only what is kept.
    """
    source = write_jsonl(folder / "dedup/documents.jsonl", documents)

    def ours():
        output = Output(out=str(folder / "deduped"), overwrite=True)
        return dedup.dedup(dedup.Dedup(files=[source], workers=1, output=output))["kept"]

    def datasketch():
        from datasketch import MinHash, MinHashLSH
        records = [record for _, record in read_records([str(source)])]
        index, kept = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS)), []
        for i, record in enumerate(records):
            words, sketch = fold_words(record["text"]).split(" "), MinHash(num_perm=BANDS * ROWS)
            grams = range(max(len(words) - SHINGLE + 1, 1))
            sketch.update_batch({" ".join(words[j:j + SHINGLE]).encode() for j in grams})
            if not index.query(sketch):
                index.insert(i, sketch)
                kept.append(json.dumps(record) + "\n")
        (folder / "kept.jsonl").write_text("".join(kept), encoding="utf-8")
        return len(kept)

    def datatrove():
        from datatrove.pipeline.dedup import minhash
        from datatrove.utils.text import TextNormConfig
        from xxhash import xxh64_intdigest
        words = TextNormConfig(remove_punctuation=False, norm_numbers=False, norm_unicode_diacritics=False)
        config = minhash.MinhashConfig(SHINGLE, BANDS, ROWS, norm_config=words)
        signed, pairs, removed = (tempfile.mkdtemp(dir=folder) for _ in range(3))
        sign = minhash.MinhashDedupSignature(signed, config, language=whitespace_words())
        # Its own hash, but xxhash 4 takes nothing but bytes.
        sign._hash_func = lambda gram: xxh64_intdigest(gram.encode())
        run_datatrove(folder, sign, source=source)
        run_datatrove(folder, minhash.MinhashDedupBuckets(signed, pairs, config=config), tasks=BANDS)
        run_datatrove(folder, minhash.MinhashDedupCluster(pairs, removed, config))
        return run_datatrove(folder, minhash.MinhashDedupFilter(removed), source=source, write=True)["total"].total

    peers = {"dedup_vs_datatrove": ("datatrove", datatrove), "dedup_vs_datasketch": ("datasketch", datasketch)}
    return compare_in_turn("documents/s", len(documents), ours, peers, rounds, documents=len(documents),
                           megabytes=megabytes(documents))


def bench_reading(folder, rounds) -> list:
    """Batches at T = 2048 from mapped shards in random order, with labels, positions and document starts.

    Peers: nanoGPT's get_batch (tokens alone) and datatrove's DatatroveFileDataset, which is made for the order of the
    file (tokens and positions).
    """
    shards, T, B, steps = Shards(folder / "shards"), 2048, 64, 20
    plan = np.arange(steps * (rounds + 1) + 2, dtype=np.int64)[:, None] * B
    config = DataConfig(context=T)
    loader = data.Loader(pack_sources({"text": shards}, config), plan, config, seed=0)
    tokens = shards.token_maps[0]
    rng, step, windows = np.random.default_rng(0), itertools.count(), max(1, len(tokens) // (T + 1))

    def get_batch():
        for _ in range(steps):
            index = rng.integers(0, len(tokens) - T - 1, B)
            for shift in (0, 1):
                torch.stack([torch.from_numpy(tokens[i + shift:i + shift + T].astype(np.int64)) for i in index])

    @cache
    def file():
        from datatrove.utils.dataset import DatatroveFileDataset
        tokens.tofile(folder / "tokens.ds")
        shards.end_maps[0].tofile(folder / "tokens.ds.index")
        return DatatroveFileDataset(str(folder / "tokens.ds"), T, tokens.itemsize, return_positions=True)

    def in_order():
        for s in range(steps):
            rows = [file()[i % windows] for i in range(s * B, (s + 1) * B)]
            for name in ("input_ids", "positions"):
                torch.stack([r[name] for r in rows])

    def ours():
        for _ in range(steps):
            loader.batch(next(step))

    peers = {"read_mtokens_per_second": ("nanoGPT get_batch", get_batch), "read_vs_datatrove": ("datatrove", in_order)}
    return compare_in_turn("M tokens/s", steps * B * T / 1e6, ours, peers, rounds)

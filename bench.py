"""Speed and memory, side by side with the peer in one run; ratios are ours / peer, medians over rounds in turn.

    python bench.py data  --json out/bench_data.json       packing against the raw encoder and datasets.map, reading
    python bench.py train --json out/bench_train.json      a training step against transformers on the same batches

Each side of a training measurement is a process of its own, so that peaks of memory are its own (imports included).
Both get the same weights, batches, threads, dtype (fp32 on a CPU) and fused AdamW with clipping. Theirs is the plain
loop `model(input_ids, labels=...).loss.backward(); clip; step`. What train.py does to its process counts as ours: it
tells glibc's allocator to keep freed memory. A row `..._their_allocator_too` gives the peer that setting as well.
"""

import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import data
import hf
import kernels
import parallel
import tokenizer as tokenizers
from config import ArgumentParser, main_guard
from model import Model, ModelConfig
from objectives import Causal
from optim import OptimConfig, make_optimizer


def machine() -> dict:
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                            cwd=Path(__file__).parent).stdout.strip()
    return {"cpu": cpu, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "commit": commit,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def row(name, unit, ours, peer=None, peer_name=None, **more) -> dict:
    out = {"name": name, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name,
           "ratio": ours / peer if peer else None, **more}
    numbers = f"{ours:12,.4g}" + (f"  {peer_name} {peer:12,.4g}  ratio {out['ratio']:.2f}" if peer else "")
    print(f"{name:34} {numbers}  {unit}" + (f"  (spread {more['spread']:.0%})" if "spread" in more else ""), flush=True)
    return out


def spread(values) -> float:
    """Range of the middle half over the median."""
    q = statistics.quantiles(values, n=4) if len(values) > 2 else [min(values), 0, max(values)]
    return (q[2] - q[0]) / statistics.median(values)


# ---- data

def bench_data(args) -> list:
    texts = [t for t in data.read_documents(args.text, "blank") if t.strip()]
    size = sum(len(data.utf8(t)) for t in texts)
    repeat = max(1, int(args.mbytes * 1e6 / size))
    texts *= repeat
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        source = folder / "corpus.jsonl"
        source.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
        paths = args.tokenizer or [default_tokenizer(texts, folder)]
        for path in paths:
            rows += bench_packing(path, source, texts, folder, args.rounds)
        rows += bench_reading(folder / "shards", args.rounds)
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
        twin = tokenizer._lib
    elif tokenizer.kind == "gpt2":
        files = (str(Path(path) / name) for name in ("vocab.json", "merges.txt"))
        twin = ByteLevelBPETokenizer.from_file(*files)._tokenizer
    else:
        return None
    for text in texts[:200]:
        assert twin.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), "the two sides differ"
    return twin


def bench_packing(path, source, texts, folder, rounds) -> list:
    """Packing a jsonl file from disk to disk, against the encoder alone on the texts in memory, and against
    datasets.map with group_texts as in transformers' run_clm.py, all with the same tokenizer and cores."""
    tokenizer = tokenizers.load(path)
    twin = hugging_face_twin(path, tokenizer, texts)
    out, times = folder / "shards", {"ours": [], "raw": [], "datasets": []}
    tokens = 0
    for _ in range(rounds):
        start = time.perf_counter()
        manifest = data.pack(data.read_documents(str(source)), tokenizer, out, heldout=0.0, overwrite=True)
        times["ours"].append(time.perf_counter() - start)
        tokens = manifest["splits"]["train"]["tokens"]
        start = time.perf_counter()
        raw_encode(tokenizer, texts)
        times["raw"].append(time.perf_counter() - start)
    rate = {side: tokens / statistics.median(t) for side, t in times.items() if t}
    which = {"tokenizer": Path(path).name, "spread": spread(times["ours"])}
    rows = [row("pack_vs_encoder", "tokens/s", rate["ours"], rate["raw"], tokenizer.library, **which)]
    if twin:
        for processes in (None, os.cpu_count()):            # the better of its two ways to use the cores
            times["datasets"].append(datasets_pipeline(twin, source, folder, processes))
        rows.append(row("pack_vs_datasets", "tokens/s", rate["ours"],
                        tokens / min(times["datasets"]), "datasets.map + group_texts",
                        seconds_by_processes=times["datasets"], **which))
    return rows


def raw_encode(tokenizer, texts):
    """The library's own batch call, on all cores, and nothing else."""
    if tokenizer.library.startswith("tokenizers"):
        return tokenizer._lib.encode_batch_fast(texts, add_special_tokens=False)
    if tokenizer.library.startswith("sentencepiece"):
        return tokenizer._lib.encode(texts, num_threads=os.cpu_count())
    return tokenizer._encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())


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
    """Batches at T = 2048 with labels, positions and document starts; peer: nanoGPT's get_batch (tokens alone)."""
    shards, T, B = data.Shards(folder), 2048, 64
    steps = 20
    counts = np.arange(steps * rounds + 2, dtype=np.int64)[:, None] * B
    loader = data.Loader({"text": shards}, counts, T, seed=0)
    loader.rows(0)
    ours, peer = [], []
    tokens = np.memmap(folder / f"{shards.records[0]['name']}.bin", shards.dtype, "r", offset=data.HEADER_BYTES)
    rng = np.random.default_rng(0)
    for r in range(rounds):
        start = time.perf_counter()
        for step in range(r * steps, (r + 1) * steps):
            loader.rows(step)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(steps):
            index = rng.integers(0, len(tokens) - T - 1, B)
            torch.stack([torch.from_numpy(tokens[i:i + T].astype(np.int64)) for i in index])
            torch.stack([torch.from_numpy(tokens[i + 1:i + 1 + T].astype(np.int64)) for i in index])
        peer.append(time.perf_counter() - start)
    rate = [steps * B * T / 1e6 / statistics.median(t) for t in (ours, peer)]
    return [row("read_mtokens_per_second", "M tokens/s", rate[0], rate[1], "nanoGPT get_batch", spread=spread(ours))]


# ---- train

MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2}
CASES = {   # vocabulary, context, rows, documents of mixed length
    "vocab_8k": (8192, 512, 8, False),
    "vocab_32k": (32768, 512, 8, False),
    "packed_2k": (8192, 2048, 2, True),
}


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
    alone, and prints the seconds; at the end {"first_loss", "peak_bytes", ...} as JSON."""
    vocab, T, rows, packed = CASES[args.case]
    config = ModelConfig(vocab_size=vocab, max_position_embeddings=T, tie_word_embeddings=False, **MODEL)
    batches, result = case_batches(args.case, 8), {}
    model = Model(config)
    model.initialise(0)
    if args.side != "transformers":
        parallel.start(args.device)
    if args.side == "ours":
        model.to(args.device)
        objective, optimizer = Causal(mask_documents=packed), make_optimizer(model, OptimConfig(lr=1e-4, min_lr=0))
        prepared = [objective.corrupt(b, None).to(args.device) for b in batches]

        def step(batch):
            loss, n, _ = objective.loss(model, batch)
            (loss / n).backward()
            return (loss / n).item()
    else:
        import transformers
        values = hf.write_config(config, torch.float32, {})
        peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values))
        peer.load_state_dict({hf.to_hf_name(k): v for k, v in model.state_dict().items()})
        model = peer.to(args.device).train()
        result["transformers"] = transformers.__version__
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        prepared = [b.tokens[:, :-1].long().to(args.device) for b in batches]

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
        result.setdefault("first_loss", step(prepared[number % len(prepared)]))
        number += 1
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number <= 3:                             # before anything but steps has asked for memory
            result["peak_bytes"] = (torch.cuda.max_memory_allocated() if args.device == "cuda"
                                    else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        print(time.perf_counter() - start, flush=True)
    print(json.dumps(result))
    return 0


@torch.no_grad()
def time_products(config, N, T, device) -> float:
    """Seconds of one step's matrix products alone, on its shapes: three a weight, and attention's at half their full
    squares (causal): two forward, five backward (one of them recomputed)."""
    D, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(D, q), (D, kv), (D, kv), (q, D), (D, F), (D, F), (F, D)]
    total = 0.0
    for n, (i, o) in [(config.num_hidden_layers, s) for s in shapes] + [(1, (D, config.vocab_size))]:
        chunk = min(N, max(1, kernels.cross_entropy.CHUNK_BYTES // (4 * o))) if o == config.vocab_size else N
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


def bench_train(args) -> list:
    """Both sides stay loaded and take their steps in turn, so that what else the machine does hits both alike."""
    rows, share = [], None
    for case, (vocab, T, batch, packed) in CASES.items():
        sides = ("ours", "transformers", "transformers_allocator")
        workers = {side: subprocess.Popen(
            [sys.executable, __file__, "worker", "--case", case, "--side", side, "--device", args.device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for side in sides}

        def ask(side, what, workers=workers, case=case):
            print(what, file=workers[side].stdin, flush=True)
            if not (answer := workers[side].stdout.readline()):
                raise ValueError(f"the {side} side of {case} failed; its error stands above")
            return float(answer)

        seconds, products, results = {side: [] for side in sides}, [], {}
        for side in sides:                                   # the first step warms up
            ask(side, "step")
        for number in range(args.steps):
            for side in sides if number % 2 else sides[::-1]:
                seconds[side].append(ask(side, "step"))
        for side, process in workers.items():
            if side == "ours" and case == "vocab_32k":
                products = [(ask(side, "products"), ask(side, "step")) for _ in range(3)]
            process.stdin.close()
            results[side] = json.loads(process.stdout.read())
            process.wait()
        median = {side: statistics.median(s) for side, s in seconds.items()}
        peer = f"transformers {results['transformers']['transformers']}"
        rows.append(row(case, "tokens/s", batch * T / median["ours"], batch * T / median["transformers"], peer,
                        context=T, rows=batch, packed=packed,
                        spread=spread([b / a for a, b in zip(seconds["ours"], seconds["transformers"])]),
                        first_loss=[results[s]["first_loss"] for s in sides], model={**MODEL, "vocab_size": vocab}))
        rows.append(row(f"{case}_their_allocator_too", "tokens/s", batch * T / median["ours"],
                        batch * T / median["transformers_allocator"], peer))
        if case == "vocab_32k":
            rows.append(row("peak_memory_32k", "bytes", *(results[side]["peak_bytes"] for side in sides[:2]), peer))
            share = statistics.median(p / s for p, s in products)
    rows.append(row("matmul_share", "of the step is its matrix products at the machine's own rate", share))
    return rows


def default_text() -> str:
    paths = ["out/demo/general.jsonl", os.environ.get("NANOCPT_DATA", "") + "/corpora/wikitext2/wiki.test.raw"]
    return next((path for path in paths if Path(path).exists()), "")


def main():
    parser = ArgumentParser(prog="bench.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=ArgumentParser)
    p = commands.add_parser("data", help="packing and reading")
    p.add_argument("--text", default=default_text(), help="text file (default: the demo's, or WikiText-2)")
    p.add_argument("--tokenizer", action="append", help="repeatable (default: GPT-2 files trained on the text)")
    p.add_argument("--mbytes", type=float, default=20, help="the text is repeated to about this size (default: 20)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", metavar="FILE")
    p = commands.add_parser("train", help="training steps")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--steps", type=int, default=12, help="steps of each side, in turn (default: 12)")
    p.add_argument("--json", metavar="FILE")
    p = commands.add_parser("worker")
    p.add_argument("--case", choices=tuple(CASES), required=True)
    p.add_argument("--side", choices=("ours", "transformers", "transformers_allocator"), required=True)
    p.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.command == "worker":
        return worker(args)
    if args.command == "data" and not args.text:
        raise ValueError("no text to pack: give --text FILE, or run make demo first")
    result = {"machine": machine(), "command": [Path(word).name if "/" in word else word for word in sys.argv[1:]],
              "rows": (bench_data if args.command == "data" else bench_train)(args)}
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main_guard(main))

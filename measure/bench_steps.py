"""Training steps on a CPU or GPU, beside transformers' and PEFT's on the same weights and batches.

Each side is a process of its own (`python -m measure.bench_steps CASE SIDE DEVICE`), so that peaks of memory are its
own, imports included. Both sides get the same weights, batches, threads, dtype (fp32) and fused AdamW with clipping;
the last target of a sequence counts on neither side, because theirs leaves it out. Theirs is the plain loop
`model(input_ids, labels=...).loss.backward(); clip; step`. What train.py does to its process counts as ours: it tells
glibc's allocator to keep freed memory. A row `..._their_allocator_too` gives the peer that setting as well.

B sequences, T tokens, D model width, F MLP width.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import data
import hf
import lora
from core import parallel
from core.devices import peak_bytes
from kernels.cross_entropy import IGNORE, chunk_rows
from learn import peft_files
from learn.adapters import adapted_layers
from learn.objectives import Causal
from learn.optim import OptimConfig, make_optimizer
from measure.bench_rows import ROOT, row, spread
from model import Model, ModelConfig

MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2}
CASES = {   # vocabulary, context, sequences, documents of mixed length
    "vocab_8k": (8192, 512, 8, False),
    "vocab_32k": (32768, 512, 8, False),
    "packed_2k": (8192, 2048, 2, True),
    "tiny": (512, 64, 2, False),                # for the tests
}
OURS, PEERS = ("ours", "materialised", "lora", "qlora"), ("transformers", "peft")
RANK, ALPHA = 8, 16


@dataclass
class TrainOptions:
    device: Literal["cpu", "cuda"] = "cpu"
    steps: int = 12
    """Steps of each side, in turn."""


@dataclass
class LoraOptions:
    steps: int = 12
    """Steps of each side, in turn."""


# ---- one side of a case, in a process of its own

def worker(case: str, side: str, device: str):
    """Answer each line on stdin with the seconds of one training step, or of the step's matmuls alone.

    At the end of stdin one more line: {"losses", "peak_bytes", ...} as JSON.
    """
    kind, _, allocator = side.partition("_")
    if kind in OURS or allocator:
        parallel.start(device)
    config = ModelConfig(vocab_size=CASES[case][0], max_position_embeddings=CASES[case][1], tie_word_embeddings=False,
                         **MODEL)
    model = Model(config)
    model.initialise(0)
    objective, batches = Causal(mask_documents=CASES[case][3]), case_batches(case, 8)
    batches = [objective.corrupt(batch, None) for batch in batches]
    for batch in batches:
        batch.labels[:, -1] = IGNORE
    result, optim_config, rates = {"losses": []}, OptimConfig(lr=1e-4, min_lr=0.0), None
    if kind in ("lora", "qlora", "peft"):
        rates, optim_config.lr = adapt(model, kind == "qlora"), 1e-3
        result["held"] = held_bytes(model)
    if kind in OURS:
        step = our_step(model, objective, optim_config, rates, device, materialised=kind == "materialised")
        prepared = [batch.to(device) for batch in batches]
    else:
        peer, result["peer"] = peer_of(model, kind)
        step = peer_step(peer, optim_config, device)
        prepared = [batch.tokens.long().to(device) for batch in batches]

    number = 0
    for line in sys.stdin:
        if line.strip() == "matmuls":
            print(time_matmuls(config, *CASES[case][1:3], device), flush=True)
            continue
        start = time.perf_counter()
        result["losses"].append(step(prepared[number % len(prepared)]))
        number += 1
        if number <= 3:                             # before anything but steps has asked for memory
            result["peak_bytes"] = peak_bytes(torch.device(device))
        print(time.perf_counter() - start, flush=True)
    print(json.dumps(result))


def case_batches(case, count, seed=0) -> list:
    """Random tokens [B, T + 1]; packed sequences hold documents of 32 to 640 tokens."""
    vocab, T, B, packed = CASES[case]
    rng, batches = np.random.default_rng(seed), []
    for _ in range(count):
        tokens = torch.from_numpy(rng.integers(0, vocab, (B, T + 1)).astype(np.int32))
        doc_start = np.zeros((B, T + 1), np.int32)
        for b in range(B if packed else 0):
            at = 0
            while at < T + 1:
                length = int(np.exp(rng.uniform(np.log(32), np.log(640))))
                doc_start[b, at:at + length] = at
                at += length
        doc_start = torch.from_numpy(doc_start)
        positions = torch.arange(T + 1, dtype=torch.int32) - doc_start
        batches.append(data.Batch(tokens, tokens, positions, doc_start, np.zeros(B, np.int64), None))
    return batches


def our_step(model, objective, optim_config, rates, device, materialised=False):
    """-> function(batch) -> loss: a step of ours, or of the same model that makes all of its logits."""
    model.to(device)
    optimizer = make_optimizer(model, optim_config, rates)

    def step(batch) -> float:
        if materialised:
            logits = model.head(model(batch.tokens, batch.position_ids))
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten().long())
        else:
            loss, n, _ = objective.loss(model, batch)
            loss = loss / n
        return update(model, optimizer, loss)
    return step


def peer_step(model, optim_config, device):
    """-> function(tokens [B, T]) -> loss: the plain loop around a model of transformers or PEFT."""
    model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=optim_config.lr,
                                  betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return lambda tokens: update(model, optimizer, model(input_ids=tokens, labels=tokens).loss)


def update(model, optimizer, loss) -> float:
    loss.backward()
    value = loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


@torch.no_grad()
def adapt(model, quantised: bool) -> dict:
    """Give the model an adapter on every linear layer of its blocks; -> the multiples of the learning rate.

    Both of an adapter's matrices are random: with B = 0, as training starts, the first loss would be the same for any
    adapter.
    """
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, base="nf4" if quantised else "plain")
    lora.attach(model, config, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.normal_(0, 0.1, generator=generator)
    return lora.lr_scales(model, config)


def held_bytes(model) -> dict:
    """Bytes of the base's weights and of its 4-bit matrices, as held and by arithmetic.

    By arithmetic an element takes 4 bits, every 64 of them 8 bits more, every 64 * 256 of them 32 bits, and a matrix
    1,092 bytes for its tables of 16 and 256 levels and an offset.
    """
    four = [layer.quantised for _, layer in adapted_layers(model) if layer.quantised is not None]
    sizes = [record.shape.numel() for record in four]
    return {"base_bytes": sum(x.nbytes for name, x in model.state_dict().items() if ".adapters." not in name),
            "quantised_numbers": sum(sizes),
            "quantised_bytes": sum(x.nbytes for record in four for x in record.buffers()),
            "arithmetic_bytes": sum(math.ceil(n / 2) + math.ceil(n / 64) + 4 * math.ceil(n / (64 * 256)) + 1092
                                    for n in sizes)}


def peer_of(model, side: str):
    """-> transformers' model with our weights, or PEFT's with our adapters too, and its name and version."""
    import transformers
    who = f"transformers {transformers.__version__}"
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf.make_config(model.config, torch.float32, {})))
    peer.load_state_dict({hf.to_hf_name(k): v for k, v in model.state_dict().items() if ".adapters." not in k})
    if side == "peft":
        import peft
        who = f"peft {peft.__version__} on {who}"
        peer = peft.get_peft_model(peer, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                                                         task_type="CAUSAL_LM"))
        peft.set_peft_model_state_dict(peer, peft_files.peft_state(model))
    return peer, who


@torch.no_grad()
def time_matmuls(config, T, B, device) -> float:
    """Seconds of one step's matmuls alone, on its shapes.

    Three a weight. Attention's are taken at half of their full squares (causal): two forward, five backward, one of
    which is recomputed.
    """
    D, F_ = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(D, q), (D, kv), (D, kv), (q, D), (D, F_), (D, F_), (F_, D)]
    total = 0.0
    for count, (i, o) in [(config.num_hidden_layers, s) for s in shapes] + [(1, (D, config.vocab_size))]:
        rows = chunk_rows(B * T, 4 * o, torch.device(device)) if o == config.vocab_size else B * T
        x, w, dy = (torch.randn(*shape, device=device) for shape in ((rows, i), (o, i), (rows, o)))
        y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)

        def three(x=x, w=w, dy=dy, y=y, dx=dx, dw=dw):
            torch.mm(x, w.T, out=y)
            torch.mm(dy, w, out=dx)
            torch.mm(dy.T, x, out=dw)
        total += count * B * T / rows * time_call(three)
    shape = (B * config.num_attention_heads, T, config.head_dim)
    a, b = torch.randn(shape, device=device), torch.randn(shape, device=device).transpose(1, 2).contiguous()
    square, out = a @ b, torch.empty_like(a)
    to_square = time_call(lambda: torch.bmm(a, b, out=square))
    from_square = time_call(lambda: torch.bmm(square, a, out=out))
    return total + config.num_hidden_layers * (3 * to_square + 4 * from_square) / 2


def time_call(call, repeats: int = 3) -> float:
    """Median seconds of a call after one that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


# ---- sides beside each other

def in_turn(case: str, sides: tuple, steps: int, device: str, matmuls: str = ""):
    """Let the sides of a case take their steps in turn, so that what else the machine does hits them alike.

    -> {side: seconds of each step}, {side: what its worker reported}, [(seconds of the matmuls, of a step)] of the side
    that `matmuls` names.
    """
    workers = {side: subprocess.Popen(
        [sys.executable, "-m", "measure.bench_steps", case, side, device], cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for side in sides}

    def ask(side, what):
        print(what, file=workers[side].stdin, flush=True)
        answer = workers[side].stdout.readline()
        if not answer:
            raise RuntimeError(f"the {side} side of {case} failed; its error stands above")
        return float(answer)

    seconds, results, shares = {side: [] for side in sides}, {}, []
    for side in sides:                                       # the first step warms up
        ask(side, "step")
    for number in range(steps):
        for side in sides if number % 2 else sides[::-1]:
            seconds[side].append(ask(side, "step"))
    for side, process in workers.items():
        if side == matmuls:
            shares = [(ask(side, "matmuls"), ask(side, "step")) for _ in range(3)]
        process.stdin.close()
        results[side] = json.loads(process.stdout.read())
        process.wait()
    return seconds, results, shares


def rate_rows(name, case, sides, seconds, results, **more) -> list:
    """Tokens per second of sides[0] against those of the peer sides[1], and of sides[2], the peer with our setting of
    the allocator."""
    vocab, T, B, packed = CASES[case]
    rate = [B * T / statistics.median(seconds[side]) for side in sides]
    peer = results[sides[1]]["peer"]
    return [row(name, "tokens/s", *rate[:2], peer, context=T, rows=B, packed=packed,
                spread=spread([b / a for a, b in zip(*(seconds[side] for side in sides[:2]))]),
                first_loss=[results[side]["losses"][0] for side in sides], model={**MODEL, "vocab_size": vocab},
                **more),
            row(f"{name}_their_allocator_too", "tokens/s", rate[0], rate[2], peer)]


def bench_train(options: TrainOptions) -> list:
    """A step of the whole model against transformers', its peak memory, and its matmuls' share of the time."""
    rows, share = [], None
    sides = ("ours", "transformers", "transformers_allocator")
    for case in ("vocab_8k", "vocab_32k", "packed_2k"):
        seconds, results, matmuls = in_turn(case, sides, options.steps, options.device,
                                            "ours" if case == "vocab_32k" else "")
        rows += rate_rows(case, case, sides, seconds, results)
        if case == "vocab_32k":
            rows.append(row("peak_memory_32k", "bytes", *(results[side]["peak_bytes"] for side in sides[:2]),
                            results["transformers"]["peer"]))
            share = statistics.median(alone / step for alone, step in matmuls)
    rows.append(row("matmul_share", "of the step is its matmuls at the machine's own rate", share))
    return rows


def bench_lora(options: LoraOptions) -> list:
    """LoRA at 32,768 ids against PEFT with the same adapters and batches, and against itself on an NF4 base (QLoRA).

    Double quantisation covers the blocks; embedding and head, here the most, stay as they are. On a CPU each matmul
    with a 4-bit weight turns it into fp32 first.
    """
    case, sides = "vocab_32k", ("lora", "peft", "peft_allocator")
    seconds, results, _ = in_turn(case, (*sides, "qlora"), options.steps, "cpu")
    losses = {side: results[side]["losses"] for side in results}
    for step, limit in ((0, 1e-5), (-1, 1e-4)):
        if not math.isclose(losses["lora"][step], losses["peft"][step], rel_tol=limit):
            raise RuntimeError(f"the two sides do not train the same: the losses of step {step} are "
                               f"{losses['lora'][step]} and {losses['peft'][step]}")
    peak = {side: results[side]["peak_bytes"] for side in results}
    peer, own = results["peft"]["peer"], "LoRA, fp32 base"
    rows = rate_rows("lora", case, sides, seconds, results, rank=RANK, losses=losses)
    rows += [row("lora_peak_memory", "bytes", peak["lora"], peak["peft"], peer),
             row("lora_peak_memory_their_allocator_too", "bytes", peak["lora"], peak["peft_allocator"], peer)]
    four, plain = results["qlora"]["held"], results["lora"]["held"]
    rate = [math.prod(CASES[case][1:3]) / statistics.median(seconds[side]) for side in ("qlora", "lora")]
    return rows + [
        row("qlora", "tokens/s", *rate, own, spread=spread([b / a for a, b in zip(seconds["qlora"], seconds["lora"])])),
        row("qlora_memory", "bytes of base weights", four["base_bytes"], plain["base_bytes"], own, **four),
        row("qlora_matrix_memory", "bytes of its 4-bit matrices", four["quantised_bytes"],
            4 * four["quantised_numbers"], own, bits=8 * four["quantised_bytes"] / four["quantised_numbers"]),
        row("qlora_peak_memory", "bytes", peak["qlora"], peak["lora"], own)]


if __name__ == "__main__":
    worker(*sys.argv[1:])

"""Training steps of train.py, beside transformers' and PEFT's on the same weights and batches.

Each side is a process of its own (`python -m measure.bench_steps CASE SIDE DEVICE`), so that peaks of memory are its
own, imports included. Ours is train.train_step, the step that ships; theirs is the plain loop
`model(input_ids, labels=...).loss.backward(); clip; step` with torch's fused AdamW. The last target of a sequence
counts on neither side, because theirs leaves it out. What train.py does to its process counts as ours: it tells glibc's
allocator to keep freed memory, and OpenMP's threads to give up their cores early. A row `..._their_allocator_too`
gives the peer these settings as well. (B sequences, T tokens, D model width, F MLP width, d head size.)
"""

import core.threads

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import linear

import data
import lora
import train
from core import parallel
from core.architecture import make_config
from core.devices import peak_bytes
from core.parameter_names import to_hf_name
from kernels.cross_entropy import IGNORE, chunk_rows
from learn import peft_files
from learn.adapters import adapted_layers
from learn.objectives import Causal
from learn.optim import LossScale, OptimConfig, make_optimizer
from measure.bench_kernels import device_limits
from measure.bench_rows import ROOT, rate_row, row, take_turns, time_call
from measure.bench_saves import save_row
from measure.kernel_cases import run as run_both_passes
from model import Model, ModelConfig, matmul_flops_per_token
from stages.build import Run, TrainSection


@dataclass(frozen=True)
class StepCase:
    """A model and its batches of random tokens; `packed` sequences hold documents of 32 to 640 tokens."""
    vocab: int
    context: int
    sequences: int
    packed: bool = False
    sizes: tuple = (256, 704, 4, 4, 2)
    """Model width, MLP width, blocks, heads, key-value heads."""
    bf16: bool = False
    """Weights in bf16 and 8-bit moments, torch's fused AdamW in bf16 on the other side; else fp32."""
    batches: int = 8
    """Different batches, which come in turn."""
    tokens = property(lambda case: case.sequences * case.context)


CASES = {
    "vocab_8k": StepCase(8192, 512, 8),
    "vocab_32k": StepCase(32768, 512, 8),
    "packed_2k": StepCase(8192, 2048, 2, packed=True),
    # 1.3M parameters, to see what waiting threads cost.
    "small": StepCase(1024, 128, 4, sizes=(128, 384, 5, 4, 2)),
    # Many lengths of documents in half precision, to see what stays in memory of each.
    "short_documents": StepCase(256, 512, 2, packed=True, sizes=(128, 256, 1, 4, 2), bf16=True, batches=500),
    # The sizes of Llama-3-8B and Llama-3.2-1B, for a GPU.
    "8b": StepCase(128256, 8192, 1, sizes=(4096, 14336, 32, 32, 8), bf16=True),
    "1b": StepCase(128256, 8192, 2, sizes=(2048, 8192, 16, 32, 8), bf16=True),
    # For the tests.
    "tiny": StepCase(512, 64, 2),
    "tiny_bf16": StepCase(512, 64, 2, sizes=(64, 96, 2, 4, 2), bf16=True),
}
OURS, PEERS = ("ours", "lora", "qlora"), ("transformers", "peft")
RANK, ALPHA = 8, 16
# libgomp's own default: a thread spins for about 3 ms before it gives up its core.
OPENMP_AS_IT_COMES = {"GOMP_SPINCOUNT": "300000"}


@dataclass
class TrainOptions:
    """Time training steps beside transformers'."""
    cases: list[Literal["vocab_8k", "vocab_32k", "packed_2k", "busy_machine", "memory_growth", "saves", "8b",
                        "1b"]] = field(
        default_factory=lambda: ["vocab_8k", "vocab_32k", "packed_2k", "busy_machine", "memory_growth", "saves"])
    """What to time; 8b and 1b are for a GPU."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    steps: int = 12
    """Steps of each side, in turn."""


@dataclass
class LoraOptions:
    """Time training steps of an adapter beside PEFT's, on a CPU."""
    steps: int = 12
    """Steps of each side, in turn."""


# ---- one side of a case, in a process of its own

def worker(name: str, side: str, device: str):
    """Answer each line on stdin with the seconds of one training step, or of the step's matmuls alone, and the end of
    stdin with {"losses", "peak_bytes", ...} as JSON."""
    case, kind = CASES[name], side.partition("_")[0]
    if kind in OURS or side.endswith("_allocator"):
        parallel.start(device)
    model = random_model(case, device)
    result = {"losses": [], "peaks": [], "matmul_flops_per_token": matmul_flops_per_token(model.config, case.context)}
    objective, rng = Causal(mask_documents=case.packed), np.random.default_rng(0)
    batches = [objective.corrupt(make_batch(case, rng), None).to(device) for _ in range(case.batches)]
    for batch in batches:
        batch.labels[:, -1] = IGNORE
    adapted = kind in ("lora", "qlora", "peft")
    optim = OptimConfig(name="adamw_8bit" if case.bf16 else "adamw", lr=1e-3 if adapted else 1e-4, min_lr=0.0,
                        schedule="constant", warmup_steps=0)
    rates = adapt(model, kind == "qlora") if adapted else None
    four = [layer.quantised for _, layer in adapted_layers(model) if layer.quantised is not None]
    # Bytes of the base's weights, and of those that are kept in 4 bits, with their number of elements.
    result["held"] = {"base_bytes": sum(x.nbytes for name, x in model.state_dict().items() if ".adapters." not in name),
                      "quantised_elements": sum(record.shape.numel() for record in four),
                      "quantised_bytes": sum(x.nbytes for record in four for x in record.state_dict().values())}
    if kind in PEERS:
        model, result["peer"] = peer_of(model, kind)
        step = peer_step(model.to(device), optim)
    else:
        step = our_step(model, objective, optim, rates, case, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    for line in sys.stdin:
        if line.strip() == "matmuls":
            print(time_matmuls(case, device), flush=True)
            continue
        batch = batches[len(result["losses"]) % len(batches)]
        print(time_call(lambda batch: result["losses"].append(step(batch)), batch), flush=True)
        result["peaks"].append(peak_bytes(torch.device(device)))
    # After three steps: only steps have asked for memory until then, and no matmuls alone.
    result["peak_bytes"] = result["peaks"][:3][-1]
    print(json.dumps(result))


@torch.no_grad()
def random_model(case: StepCase, device) -> Model:
    """The same random weights in every process, made on the device: 8B normal values take minutes on a CPU."""
    D, F, blocks, heads, kv_heads = case.sizes
    config = ModelConfig(vocab_size=case.vocab, hidden_size=D, intermediate_size=F, num_hidden_layers=blocks,
                         num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
                         max_position_embeddings=case.context)
    torch.manual_seed(0)
    with torch.device(device):
        model = Model(config).to(torch.bfloat16 if case.bf16 else torch.float32)
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    # A card that cannot hold 8B parameters and their activations recomputes each block in the backward pass.
    model.checkpoint_blocks = (device == "cuda" and blocks == 32
                               and torch.cuda.get_device_properties(0).total_memory < 110e9)
    return model


def make_batch(case: StepCase, rng: np.random.Generator) -> data.Batch:
    """A batch of random tokens [B, T + 1]."""
    B, T = case.sequences, case.context
    tokens = torch.from_numpy(rng.integers(0, case.vocab, (B, T + 1)).astype(np.int32))
    doc_start = torch.zeros_like(tokens)
    if case.packed:
        lengths = np.exp(rng.uniform(np.log(32), np.log(640), (B, T // 32 + 1))).astype(int)
        starts = [np.repeat(np.cumsum(own) - own, own)[:T + 1] for own in lengths]
        doc_start = torch.from_numpy(np.array(starts, np.int32))
    positions = torch.arange(T + 1, dtype=torch.int32) - doc_start
    return data.Batch(tokens, tokens, positions, doc_start, np.zeros(B, np.int64), None)


def our_step(model, objective, optim, rates, case, device):
    """Return function(batch) -> loss: train.train_step on a run that has a model and a plan and nothing else."""
    c = train.Config(device=device, optim=optim, train=TrainSection(precision="bf16" if case.bf16 else "fp32"))
    plan = np.zeros((1000, 1), np.int64)
    run = Run(c, parallel.World(0, 1, torch.device(device)), folder=None, base=None, tokenizer=None,
              config=model.config, sources={}, loader=SimpleNamespace(names=["random"], plan=plan), planned=plan,
              objective=objective, inner=model, model=model.train(), optimizer=make_optimizer(model, optim, rates),
              scale=LossScale(False))
    count = iter(range(1000))
    return lambda batch: train.train_step(run, next(count), [batch])["loss"]


def peer_step(model, optim):
    """Return function(batch) -> loss: the plain loop around a model of transformers or PEFT."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batch) -> float:
        tokens = batch.tokens.long()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


@torch.no_grad()
def adapt(model, quantised: bool) -> dict:
    """Give the model an adapter on every linear layer of its blocks; return the multiples of the learning rate."""
    config = lora.LoraConfig(rank=RANK, alpha=ALPHA, base="nf4" if quantised else "plain")
    lora.attach(model, config, seed=0)
    # With B = 0, as training starts, the first loss would be the same for any adapter.
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.normal_(0, 0.1, generator=generator)
    return lora.lr_scales(model, config)


def peer_of(model, side: str):
    """Return transformers' model with our weights, or PEFT's with our adapters too, and its name and version."""
    import transformers
    who = f"transformers {transformers.__version__}"
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**make_config(model.config, torch.float32, {})))
    peer.load_state_dict({to_hf_name(k): v for k, v in model.state_dict().items() if ".adapters." not in k})
    if side == "peft":
        import peft
        who = f"peft {peft.__version__} on {who}"
        peer = peft.get_peft_model(peer, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                                                         task_type="CAUSAL_LM"))
        peft.set_peft_model_state_dict(peer, peft_files.peft_state(model))
    return peer, who


def time_matmuls(case: StepCase, device) -> float:
    """Seconds of one step's matmuls alone, forward and backward, on its shapes.

    Attention has six, and a seventh of the same size because its backward pass computes the scores anew; they count at
    half of their time, because a causal mask leaves half of the scores.
    """
    D, F, blocks, heads, kv_heads = case.sizes
    d, BT = D // heads, case.sequences * case.context

    def seconds(op, *shapes) -> float:
        inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        # The first run, which makes the upstream gradients, warms up.
        upstream = run_both_passes(op, inputs)[1]
        return statistics.median(time_call(run_both_passes, op, inputs, upstream) for _ in range(3))

    weights = [(heads * d, D), (kv_heads * d, D), (kv_heads * d, D), (D, heads * d), (F, D), (F, D), (D, F)]
    total = blocks * sum(seconds(linear, (BT, i), (o, i)) for o, i in weights)
    rows = chunk_rows(BT, 4 * case.vocab, torch.device(device))
    total += BT / rows * seconds(linear, (rows, D), (case.vocab, D))
    six = seconds(lambda q, k, v: q @ k.mT @ v, *[(case.sequences * heads, case.context, d)] * 3)
    return total + blocks * six * 7 / 6 / 2


# ---- sides beside each other

def environment_of(side: str, turns: int) -> dict:
    """The variables of a side's process: for peers and for ours_spinning OpenMP as it comes, else our `turns`."""
    kind, _, option = side.partition("_")
    as_it_comes = option == "spinning" or (kind in PEERS and not option)
    return {**os.environ, **(OPENMP_AS_IT_COMES if as_it_comes else {"GOMP_SPINCOUNT": str(turns)})}


def in_turn(case: str, sides: tuple, steps: int, device: str, matmuls: str = ""):
    """Let the sides of a case take their steps in turn.

    Returns {side: seconds of each step}, {side: what its worker reported}, and [(seconds of the matmuls, of a step)] of
    the side that `matmuls` names. A side after the first that fails before its second step (it does not fit on the
    card) is left out.
    """
    # By what runs beside this case, which may not be what ran when this process began.
    turns = core.threads.choose_spin_turns(core.threads.count_others(), os.cpu_count())
    workers = {side: subprocess.Popen(
        [sys.executable, "-m", "measure.bench_steps", case, side, device], cwd=ROOT, env=environment_of(side, turns),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for side in sides}

    def ask(side, what) -> float | None:
        try:
            print(what, file=workers[side].stdin, flush=True)
        except BrokenPipeError:
            return None
        answer = workers[side].stdout.readline()
        return float(answer) if answer else None

    # The first step warms up.
    fit = [side for side in sides if ask(side, "step") is not None]
    if sides[0] not in fit:
        raise RuntimeError(f"the {sides[0]} side of {case} failed; its error stands above")
    seconds = take_turns({side: partial(ask, side, "step") for side in fit}, steps)
    shares = [(ask(matmuls, "matmuls"), ask(matmuls, "step")) for _ in range(3 if matmuls else 0)]
    return seconds, {side: json.loads(workers[side].communicate()[0]) for side in fit}, shares


def rate_rows(name, case, sides, seconds, results, **more) -> list:
    """Tokens per second of sides[0] against those of the peer sides[1], and of sides[2], the peer with our settings."""
    ours, tokens, more = seconds[sides[0]], CASES[case].tokens, asdict(CASES[case]) | more
    # Each peer's suffix goes with it, whichever of them ran.
    peers = {side: suffix for side, suffix in zip(sides[1:], ("", "_their_allocator_too")) if side in seconds}
    if not peers:
        return [row(name, "tokens/s", tokens / statistics.median(ours), left_out=sides[1:], **more)]
    more["first_loss"] = [results[side]["losses"][0] for side in (sides[0], *peers)]
    return [rate_row(name + suffix, "tokens/s", tokens, ours, seconds[side], results[side]["peer"], **more)
            for side, suffix in peers.items()]


def bench_train(options: TrainOptions) -> list:
    """Steps of the whole model against transformers', peak memory, and the matmuls' share of the time."""
    rows = []
    for case in options.cases:
        if case == "busy_machine":
            rows += busy_rows(options.steps)
        elif case == "memory_growth":
            rows.append(memory_row(options.device))
        elif case == "saves":
            rows.append(save_row())
        else:
            rows += train_rows(case, options)
    return rows


def train_rows(case: str, options: TrainOptions) -> list:
    sides, largest = ("ours", "transformers", "transformers_allocator"), case == "vocab_32k"
    if CASES[case].bf16:
        sides = sides[:1 if case == "8b" else 2]
    seconds, results, matmuls = in_turn(case, sides, options.steps, options.device, "ours" if largest else "")
    rows = rate_rows(case, case, sides, seconds, results)
    if largest or CASES[case].bf16:
        peer = results.get("transformers", {})
        rows.append(row(f"peak_memory_{case.removeprefix('vocab_')}", "bytes", results["ours"]["peak_bytes"],
                        peer.get("peak_bytes"), peer.get("peer")))
    if largest:
        rows.append(row("matmul_share", "of the step is its matmuls at the machine's own rate",
                        statistics.median(alone / step for alone, step in matmuls)))
    if options.device == "cuda":
        done = results["ours"]["matmul_flops_per_token"] * rows[0]["ours"] / 1e12
        rows.append(row(f"matmul_rate_{case}", "TFLOP/s", done, device_limits()["bf16_tflops"], "8192 x 8192 matmul"))
    return rows


def memory_row(device: str) -> dict:
    """What 500 steps on packed documents of many lengths leave in memory that 20 steps do not."""
    _, results, _ = in_turn("short_documents", ("ours",), 500, device)
    peaks = results["ours"]["peaks"]
    return row("memory_growth", "bytes, peak of 500 steps", peaks[-1], peaks[19], "of 20 steps")


def busy_rows(steps: int) -> list:
    """A small model on all cores, with our setting of OpenMP's threads against OpenMP as it comes.

    `busy_machine_quiet` is on the machine as it is, `busy_machine` beside one busy loop per core, and
    `busy_machine_crowded` beside five.
    """
    rows, sides, cores = [], ("ours", "ours_spinning"), os.cpu_count()
    for name, loops in (("busy_machine_quiet", 0), ("busy_machine", cores), ("busy_machine_crowded", 5 * cores)):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
        try:
            seconds, _, _ = in_turn("small", sides, steps, "cpu")
        finally:
            for process in busy:
                process.kill()
                process.wait()
        rows.append(rate_row(name, "tokens/s", CASES["small"].tokens, *(seconds[side] for side in sides),
                             "OpenMP as it comes", busy_loops=loops, cores=cores))
    return rows


def bench_lora(options: LoraOptions) -> list:
    """LoRA at 32,768 ids against PEFT with the same adapters and batches, and against itself on an NF4 base (QLoRA).

    Double quantisation covers the blocks; embedding and head, here the most, stay as they are. On a CPU each matmul
    with a 4-bit weight turns it into fp32 first.
    """
    case, sides = "vocab_32k", ("lora", "peft", "peft_allocator")
    seconds, results, _ = in_turn(case, (*sides, "qlora"), options.steps, "cpu")
    losses = {side: result["losses"] for side, result in results.items()}
    for step, limit in ((0, 1e-5), (-1, 1e-4)):
        pair = losses["lora"][step], losses["peft"][step]
        if not math.isclose(*pair, rel_tol=limit):
            raise RuntimeError(f"the two sides do not train the same: the losses of step {step} are {pair}")
    peak = {side: result["peak_bytes"] for side, result in results.items()}
    peer, own = results["peft"]["peer"], "LoRA, fp32 base"
    four, plain = results["qlora"]["held"], results["lora"]["held"]
    return rate_rows("lora", case, sides, seconds, results, rank=RANK, losses=losses) + [
        row("lora_peak_memory", "bytes", peak["lora"], peak["peft"], peer),
        row("lora_peak_memory_their_allocator_too", "bytes", peak["lora"], peak["peft_allocator"], peer),
        rate_row("qlora", "tokens/s", CASES[case].tokens, seconds["qlora"], seconds["lora"], own),
        row("qlora_memory", "bytes of base weights", four["base_bytes"], plain["base_bytes"], own, **four),
        row("qlora_matrix_memory", "bytes of its 4-bit matrices", four["quantised_bytes"],
            4 * four["quantised_elements"], own, bits=8 * four["quantised_bytes"] / four["quantised_elements"]),
        row("qlora_peak_memory", "bytes", peak["qlora"], peak["lora"], own)]


if __name__ == "__main__":
    worker(*sys.argv[1:])

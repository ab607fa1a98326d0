"""model.py against transformers, an independent implementation of every family, and against laws.

Laws: a document sees nothing of its neighbours and a token nothing of the future, bit for bit; a cache, recomputation
of the blocks and the way a row is cut change nothing; the same seed gives the same weights.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import hf
import kernels
from core.parameter_names import to_hf_name
from model import KVCache, Model, matmul_flops_per_token, rope_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# SmolLM3's default special tokens are outside a vocabulary of 97
SMOL3 = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES = {
    "llama1": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048}),
    "llama2": ("llama", {"rms_norm_eps": 1e-5, "num_hidden_layers": 4}),
    "llama3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3.1": ("llama", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}}),
    "llama3.2": ("llama", {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3, "factor": 32.0},
                           "tie_word_embeddings": True, "head_dim": 16}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}}),
    "yarn": ("llama", {"rope_parameters": {"rope_theta": 10000.0, **YARN}}),
    "yarn_factor": ("llama", {"rope_parameters": {"rope_theta": 10000.0, **YARN, "attention_factor": 0.7}}),
    "yarn_mscale": ("llama", {"rope_parameters": {"rope_theta": 10000.0, **YARN, "mscale": 0.707,
                                                  "mscale_all_dim": 0.3}}),
    "yarn_betas": ("llama", {"head_dim": 32, "rope_parameters": {"rope_theta": 1000.0, **YARN, "beta_fast": 4.0,
                                                                 "beta_slow": 0.25, "truncate": False}}),
    "yarn_truncated": ("llama", {"head_dim": 32, "rope_parameters": {"rope_theta": 1000.0, **YARN, "beta_fast": 4.0,
                                                                     "beta_slow": 0.25}}),
    "yarn_silent": ("llama", {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0}}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral_null": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "mistral_two": ("mistral", {"sliding_window": 2, "num_hidden_layers": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2_windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2.5_unused": ("qwen2", {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2.5_beyond": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3,
                                 "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_windows": ("qwen3", {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True,
                                "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "num_attention_heads": 9,
                          "num_key_value_heads": 3, "hidden_size": 36,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}),
    "smollm3": ("smollm3", {**SMOL3, "no_rope_layer_interval": 2}),
    "smollm3_named": ("smollm3", {**SMOL3, "num_hidden_layers": 4, "no_rope_layers": [0, 1, 1, 0],
                                  "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "smollm3_windows": ("smollm3", {**SMOL3, "no_rope_layer_interval": 2, "use_sliding_window": True,
                                    "sliding_window": 5}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral_window": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 7}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3,
                                "moe_intermediate_size": 24, "norm_topk_prob": True}),
    "qwen3_moe_dense": ("qwen3_moe", {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3,
                                      "moe_intermediate_size": 24, "mlp_only_layers": [2], "decoder_sparse_step": 2,
                                      "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 6}),
    "tinyllama": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}),
    "falcon3": ("llama", {"head_dim": 64, "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
                          "rope_parameters": {"rope_type": "default", "rope_theta": 1000042.0}}),
}
DOCUMENTS = [[1, 13, 7, 19], [22, 18]]           # lengths in each of two rows of 40 tokens


def tokens(rows=2, length=40, seed=1, vocab=97):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def pack(documents=DOCUMENTS):
    """(doc_start, position_ids), both [B, T], of rows that hold documents of these lengths."""
    starts, positions = [], []
    for row in documents:
        begin = [sum(row[:i]) for i in range(len(row))]
        starts.append([b for b, n in zip(begin, row) for _ in range(n)])
        positions.append([i for n in row for i in range(n)])
    return torch.tensor(starts, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32)


def each_document(x, documents=DOCUMENTS):
    """(row, slice, tokens [1, n]) of every document in the packed rows x."""
    for row, lengths in enumerate(documents):
        at = 0
        for n in lengths:
            yield row, slice(at, at + n), x[row:row + 1, at:at + n]
            at += n


def logits(model, *args, **kwargs):
    return model.head(model(*args, **kwargs))


def assert_same_logits(ours, theirs):
    assert 1 < theirs.abs().max() < 30                     # else 1e-4 would mean little, or nothing could meet it
    assert (ours - theirs).abs().max() < 1e-4


# ---- against transformers

@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(hf_model, name):
    family, options = FAMILIES[name]
    theirs, folder = hf_model(family, **options)
    ours, x = hf.load(folder).eval(), tokens()
    assert_same_logits(logits(ours, x), theirs(x).logits)
    doc_start, position_ids = pack()
    packed = logits(ours, x, position_ids, doc_start)
    for row, where, alone in each_document(x):
        assert (packed[row, where] - theirs(alone).logits[0]).abs().max() < 1e-4, (row, where)
    assert (packed - logits(ours, x)).abs().max() > 0.1    # the packing was not ignored


def blocks(doc_start, window=None, documents=True):
    """transformers' additive mask [B, 1, T, T], made without our code; one query and one key at a time."""
    B, T = doc_start.shape
    mask = torch.full((B, 1, T, T), torch.finfo(torch.float32).min)
    for b in range(B):
        for query in range(T):
            for key in range(query + 1):
                if (window is None or query - key < window) and \
                        (not documents or doc_start[b, key] == doc_start[b, query]):
                    mask[b, 0, query, key] = 0.0
    return mask


@pytest.mark.parametrize("name", ["llama3.1", "mistral", "qwen2_windows", "qwen3", "smollm3"])
@torch.no_grad()
def test_the_two_switches_of_packing_are_separate(hf_model, name):
    family, options = FAMILIES[name]
    theirs, folder = hf_model(family, **options)
    ours, x = hf.load(folder).eval(), tokens()
    doc_start, restarted = pack()
    counted = torch.arange(40).expand(2, -1)

    def truth(positions, documents):
        window = options.get("sliding_window")
        mask = blocks(doc_start, window if family == "mistral" else None, documents)
        if family in ("qwen2", "qwen3", "smollm3"):        # these take one mask a kind of layer
            mask = {"full_attention": mask, "sliding_attention": blocks(doc_start, window, documents)}
        return theirs(x, attention_mask=mask, position_ids=positions).logits

    outcomes = [logits(ours, x, doc_start=doc_start), logits(ours, x, restarted), logits(ours, x, restarted, doc_start)]
    assert_same_logits(outcomes[0], truth(counted, documents=True))
    assert_same_logits(outcomes[1], truth(restarted.long(), documents=False))
    assert_same_logits(outcomes[2], truth(restarted.long(), documents=True))
    # Relative positions make restarting invisible behind a mask, and only there.
    assert (outcomes[0] - outcomes[2]).abs().max() < 1e-4
    assert (outcomes[0] - outcomes[1]).abs().max() > 0.1


@torch.no_grad()
def test_dynamic_rope_longer_shorter_and_packed(hf_model):
    """The base follows the row at hand: longer than trained, within, and longer again after a short one.

    Ours depends on the row alone. transformers forgets a long row only when one below the trained length comes, so that
    the lengths here are in an order in which it too gives each row its own base.
    """
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    theirs, folder = hf_model("llama", max_position_embeddings=16, rope_parameters=dynamic)
    ours = hf.load(folder).eval()
    plain = Model(ours.config.__class__(**{**vars(ours.config), "rope_scaling": {}}))
    plain.load_state_dict(ours.state_dict())
    for length in (40, 10, 24, 15, 16, 50):
        x = tokens(length=length)
        assert_same_logits(logits(ours, x), theirs(x).logits)
        assert (logits(ours, x) - logits(plain, x)).abs().max() > 1e-3 or length <= 16
    for documents in ([[9, 16, 15], [16, 12, 12]], [[20, 20], [20, 20]]):        # all within; all longer, alike
        x, (doc_start, position_ids) = tokens(), pack(documents)
        packed = logits(ours, x, position_ids, doc_start)
        for row, where, alone in each_document(x, documents):
            assert (packed[row, where] - theirs(alone).logits[0]).abs().max() < 1e-4


@torch.no_grad()
def test_real_model(data_dir):
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    folder = data_dir / "models" / "stories260K"
    ours = hf.load(folder).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    x = tokens(3, 200, vocab=512)
    assert ours.count_parameters() == 260032
    assert_same_logits(logits(ours, x), theirs(x).logits)
    # Greedy from BOS the model tells a story; the ids are transformers'.
    expected = theirs.generate(torch.tensor([[1]]), max_new_tokens=60, do_sample=False)[0]
    row = torch.tensor([[1]])
    for _ in range(60):
        row = torch.cat([row, logits(ours, row)[:, -1:].argmax(-1)], dim=1)
    assert row[0, :len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", ["tied", "qwen3", "qwen2_windows"])
def test_gradients_equal_transformers(hf_model, name, packed):
    """Every parameter's gradient of the summed loss, ours without logits, theirs through F.cross_entropy."""
    family, options = FAMILIES[name]
    theirs, folder = hf_model(family, **options)
    ours, x = hf.load(folder), tokens()
    labels = tokens(seed=2)
    labels[0, 3:9] = labels[1, 30:] = -100
    doc_start, position_ids = pack() if packed else (None, None)
    loss, _, _ = kernels.linear_cross_entropy(ours(x, position_ids, doc_start), ours.head.weight, labels)
    loss.backward()
    pieces = each_document(x) if packed else [(slice(None), slice(None), x)]
    total = 0.0
    for row, where, alone in pieces:
        z = theirs(alone).logits
        total = total + F.cross_entropy(z.flatten(0, 1), labels[row, where].flatten(), reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        truth = expected.pop(to_hf_name(parameter_name)).grad
        assert truth.abs().max() > 0.01, parameter_name
        assert (parameter.grad - truth).abs().max() < 1e-5 * truth.abs().max(), parameter_name
    assert not expected


# ---- laws

@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_a_document_sees_nothing_of_its_neighbours(tiny_model, window):
    model, x = tiny_model(windows=[window] * 3), tokens()
    doc_start, position_ids = pack()
    changed = x.clone()
    changed[0, 1:14] = (changed[0, 1:14] + 1) % 97                 # the second document of the first row
    others = torch.ones(2, 40, dtype=torch.bool)
    others[0, 1:14] = False
    masked = [model(y, position_ids, doc_start) for y in (x, changed)]
    assert torch.equal(masked[0][others], masked[1][others])
    assert not torch.equal(masked[0][0, 1:14], masked[1][0, 1:14])
    opened = [model(y, position_ids) for y in (x, changed)]
    assert (opened[0] - opened[1])[0, 14].abs().max() > 1e-3       # with the mask off the next document sees it


@torch.no_grad()
def test_causality(tiny_model):
    model, x = tiny_model(), tokens()
    changed = x.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 97
    assert torch.equal(model(x)[:, :25], model(changed)[:, :25])
    both = [model(y, causal=False) for y in (x, changed)]
    assert ((both[0] - both[1]).abs().amax(-1) > 1e-4).all()       # every position sees the change


@torch.no_grad()
def test_bidirectional_stays_inside_documents(tiny_model):
    model, x = tiny_model(), tokens()
    doc_start, position_ids = pack()
    packed = model(x, position_ids, doc_start, causal=False)
    for row, where, alone in each_document(x):
        assert (packed[row, where] - model(alone, causal=False)[0]).abs().max() < 1e-5


@torch.no_grad()
def test_a_window_reaches_back_so_far_and_no_further(tiny_model):
    """With one layer and a window of 5 tokens, itself included, position 20 sees 16 to 20."""
    model, x = tiny_model(num_hidden_layers=1, windows=[5]), tokens(1)
    base = model(x)[0, 20]
    for position in range(40):
        changed = x.clone()
        changed[0, position] = (changed[0, position] + 1) % 97
        assert torch.equal(model(changed)[0, 20], base) == (position not in range(16, 21)), position


@pytest.mark.parametrize("windows", [None, [6, None, 1]])
@torch.no_grad()
def test_cache_equals_uncached(tiny_model, windows):
    model, x = tiny_model(windows=windows, no_rope_layers=[1]), tokens()
    whole = model(x)
    for cuts in ([12] + [1] * 28, [1] * 40, [7, 9, 1, 23], [40]):     # decoding; from nothing; chunked prefill; at once
        cache, parts = KVCache(40), []
        for piece in x.split(cuts, dim=1):
            parts.append(model(piece, cache=cache))
        assert cache.length == 40
        assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5, cuts
    with pytest.raises(AssertionError, match="holds 40 tokens, but 41 are needed"):
        model(x[:, :1], cache=cache)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_recomputing_blocks_changes_nothing(tiny_model, packed):
    x, labels = tokens(), tokens(seed=2)
    doc_start, position_ids = pack() if packed else (None, None)
    results = []
    for recompute in (0, 1, 2):
        model = tiny_model(windows=[None, 8, 8]).train()
        model.checkpoint_blocks = recompute
        loss, _, _ = kernels.linear_cross_entropy(model(x, position_ids, doc_start), model.head.weight, labels)
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results))


def test_recomputing_blocks_keeps_less(tiny_model):
    """Between forward and backward a recomputed block keeps its input, not what its layers made of it; of every two
    blocks, the first."""
    model, kept = tiny_model().train(), []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    totals = []
    for model.checkpoint_blocks in (0, 1, 2):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(tokens())
        totals.append(sum(kept))
    assert totals[1] < totals[0] / 4
    # Two of three blocks.
    assert totals[2] == pytest.approx((totals[0] + 2 * totals[1]) / 3, rel=0.03)


def test_training_after_inference_mode(tiny_model):
    """An evaluation in inference mode may come first; the angles it made must serve the backward pass too."""
    model, x = tiny_model(), tokens()
    with torch.inference_mode():
        before = model(x)
    hidden = model(x)
    hidden.sum().backward()
    assert torch.equal(hidden, before)


@torch.no_grad()
def test_autocast_keeps_positions_exact(tiny_model):
    """In bf16 the angles of long rows would be off by whole turns; only the products may be rounded."""
    x = tokens(1, 3000)
    whole = tiny_model()(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tiny_model()(x)
    error = (rounded.float() - whole).abs()
    assert error[:, -100:].mean() < 2 * error[:, :100].mean()      # no worse far out
    assert error.mean() < 0.05 * whole.abs().mean()


# ---- configuration, initialisation, arithmetic

@pytest.mark.parametrize(("changes", "message"), [
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4"),
    ({"head_dim": 7}, "head_dim is 7.*even"),
    ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ({"windows": [4]}, "windows names 1 layers of 3"),
    ({"rope_scaling": {"rope_type": "su"}}, "rope_type 'su' is not known; known are default, linear"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "attention_factor": 1.0,
                       "original_max_position_embeddings": 8}},
     "1 values of short_factor, but a head of 8 has 4 pairs"),
    ({"rope_scaling": {"rope_type": "linear", "factor": -2.0}}, "rope_scaling has factor -2.0, but it must be above 0"),
    ({"rope_theta": float("nan")}, "rope_theta is nan, but must be above 1"),
])
def test_impossible_configs_say_why(tiny_config, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_defaults_of_a_config(tiny_config):
    config = tiny_config(num_key_value_heads=None)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert tiny_config(hidden_size=30, head_dim=8).head_dim == 8


def test_initialise(tiny_config):
    config = tiny_config(vocab_size=1000, hidden_size=64, attention_bias=True, mlp_bias=True, qk_norm=True)
    models = [Model(config) for _ in range(3)]
    for model, seed in zip(models, (7, 7, 8)):
        model.initialise(seed)
    first, same, other = (dict(model.named_parameters()) for model in models)
    for name, value in first.items():
        assert torch.equal(value, same[name])
        if name.endswith("bias"):
            assert (value == 0).all()
        elif name.endswith("norm.weight"):
            assert (value == 1).all()
        else:
            assert not torch.equal(value, other[name])
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(6) if residual else 0.02            # GPT-2's rule: 2 residuals a layer
            assert value.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(value.mean().item()) < expected / 10


def test_initialise_refuses_an_unknown_parameter(tiny_config):
    model = Model(tiny_config())
    model.layers[0].other = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match=r"layers\.0\.other\.weight"):
        model.initialise(0)


def test_initialise_keeps_a_tied_head_tied(tiny_config):
    model = Model(tiny_config(tie_word_embeddings=True))
    model.initialise(3)
    assert model.head.weight is model.embed_tokens.weight
    assert model.count_parameters() == Model(tiny_config()).count_parameters() - 97 * 32


def test_rope_frequencies_by_hand(tiny_config):
    """d = 4, base 10000: the pairs turn by 1 and 1/100 a token; linear divides; llama3 keeps fast and divides slow."""
    frequency, amplitude = rope_frequencies(tiny_config(head_dim=4), 10)
    assert frequency.tolist() == pytest.approx([1.0, 0.01])
    assert amplitude == 1.0
    frequency, _ = rope_frequencies(tiny_config(head_dim=4, rope_scaling={"rope_type": "linear", "factor": 2.0}), 10)
    assert frequency.tolist() == pytest.approx([0.5, 0.005])
    frequency, _ = rope_frequencies(tiny_config(head_dim=4, rope_scaling=LLAMA3), 10)   # 5.1 and 0.05 turns in 32
    assert frequency.tolist() == pytest.approx([1.0, 0.01 / 8])
    _, amplitude = rope_frequencies(tiny_config(head_dim=4, rope_scaling=YARN), 10)
    assert amplitude == pytest.approx(0.1 * math.log(4) + 1)


def test_matmul_flops(tiny_model):
    """6 floating-point operations a weight that multiplies, and 12 H d times half the context a layer."""
    model = tiny_model()
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert matmul_flops_per_token(model.config, 40) == 6 * weights + 3 * 12 * 32 * 40 / 2


def test_shard_plan_is_the_blocks(tiny_model):
    model = tiny_model()
    assert model.shard_plan() == list(model.layers)


def test_layers_that_compute_together_get_their_input_once(tiny_model):
    """A layer's `apply_together` is handed all projections of the input it shares, and its results are what is used."""
    model, calls = tiny_model(), []

    class Together(torch.nn.Linear):
        @staticmethod
        def apply_together(x, linears):
            calls.append(len(linears))
            return [F.linear(x, linear.weight) for linear in linears]
    x = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        truth = model(x)
        for name in ("self_attn.k_proj", "mlp.gate_proj"):
            layer = model.layers[1].get_submodule(name)
            layer.__class__ = Together
        assert torch.equal(model(x), truth)
    assert calls == [3, 2]

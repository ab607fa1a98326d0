"""kernels/adamw.py: against torch.optim.AdamW in float64, kernels against reference, roundings by their statistics."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from quick import slow_except

from kernels import adamw, backend
from kernels.adamw import KINDS, adamw_, init_state, join, split

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("one_thread")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "triton"]
EIGHT = [kind for kind in KINDS if kind.startswith("int8")]
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.95), 1e-8, 0.1


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)


def weights_of(kind, *shape, seed=0):
    return normal(*shape, seed=seed, dtype=torch.bfloat16 if "+" in kind else torch.float32)


def exact(param, state):
    """The weights as the optimizer knows them."""
    return join(param, state["ecc"]) if "ecc" in state else param.float()


def torch_adamw(weights, gradients, lr=LR, betas=BETAS, decay=DECAY):
    """float64 weights after each step of torch's own AdamW, one tensor at a time."""
    parameter = torch.nn.Parameter(weights.double().clone())
    optimizer = torch.optim.AdamW([parameter], lr=lr, betas=betas, eps=EPS, weight_decay=decay, foreach=False)
    after = []
    for gradient in gradients:
        parameter.grad = gradient.double()
        optimizer.step()
        after.append(parameter.detach().clone())
    return after


# ---- fp32 and float64

def test_float64_is_torch():
    param, gradients = normal(7, 5, dtype=torch.float64), [normal(7, 5, seed=s) for s in range(1, 21)]
    truth, state = torch_adamw(param, gradients)[-1], init_state(param, "fp32")
    for step, gradient in enumerate(gradients, 1):
        adamw_([param], [gradient.double()], [state], LR, BETAS, EPS, DECAY, step)
    assert (param - truth).abs().max() < 1e-14 * 20


@pytest.mark.parametrize("name", BACKENDS)
def test_fp32_is_torch(name):
    shapes, steps = [(33, 41), (5,), (), (9000,)], 20
    params = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    gradients = [[normal(*shape, seed=100 * s + i) for i, shape in enumerate(shapes)] for s in range(steps)]
    truth = [torch_adamw(p, [g[i] for g in gradients])[-1] for i, p in enumerate(params)]
    states = [init_state(p, "fp32") for p in params]
    with backend.using(name):
        for step in range(steps):
            adamw_(params, gradients[step], states, LR, BETAS, EPS, DECAY, step + 1)
    for got, expected in zip(params, truth):
        # a step rounds the weight once, and an update of at most 4 rates in about ten operations
        bound = steps * (2.0**-24 * expected.abs().max() + 10 * 2.0**-24 * 4 * LR)
        assert (got - expected).abs().max() <= bound


# ---- the kernels against the reference

def mixed(kind, dtype):
    """A list of sizes: over a chunk, odd, tails of groups, none, and a tensor that does not begin at 16 bytes."""
    shapes = [(9, 1024), (37,), (3, 11, 7), (0,), (0, 64), (2048,), (31,), (1,), (64, 32), ()]
    params = [weights_of(kind, *shape, seed=i) for i, shape in enumerate(shapes)]
    params.append(weights_of(kind, 1000, seed=50)[3:900])
    params.append(weights_of(kind, 96, seed=51)[1:])
    grads = [normal(*p.shape, seed=60 + i, dtype=dtype) for i, p in enumerate(params)]
    grads[2] = normal(7, 11, 3, seed=70, dtype=dtype).permute(2, 1, 0)            # another order in memory
    grads[8] = normal(64, 1, seed=71, dtype=dtype).expand(64, 32)
    return params, grads


def run(name, kind, dtype, steps=2, table=None):
    params, grads = mixed(kind, dtype)
    states = [init_state(p, kind) for p in params]
    kept = [g.clone() for g in grads]
    with backend.using(name):
        for step in range(1, steps + 1):
            adamw_(params, grads, states, LR, BETAS, EPS, DECAY, step, table)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept)), "a gradient was written to"
    return params, states


@pytest.mark.parametrize(("kind", "dtype"), slow_except(
    [("fp32", torch.float32), ("int8+ecc", torch.bfloat16)], product(KINDS, [torch.float32, torch.bfloat16])))
def test_kernel_is_reference(kind, dtype, monkeypatch):
    """To the bit in the interpreter, once torch's square roots are the nearest too; on a GPU quotients and roots are
    approximate and a code may fall to the other side of a half, which moves it by one."""
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.sqrt(x.numpy())))
    found, expected = run("triton", kind, dtype, table={}), run("reference", kind, dtype)
    for p, q, s, t in zip(found[0], expected[0], found[1], expected[1]):
        if DEVICE == "cpu":
            assert torch.equal(p, q)
            assert all(torch.equal(x, y) for x, y in zip(s.values(), t.values(), strict=True))
        elif p.numel():
            allowed = 2.0**-16 if s["m"].is_floating_point() else 0.05 * LR * 2
            assert (exact(p, s) - exact(q, t)).abs().max() <= allowed * max(1, exact(q, t).abs().max())
            if not s["m"].is_floating_point():
                assert (s["m"].int() - t["m"].int()).abs().max() <= 1
                assert (s["v"].int() - t["v"].int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["int8+ecc", "fp32"])
def test_two_runs_agree(kind):
    first, second = run("triton", kind, torch.float32, 1), run("triton", kind, torch.float32, 1)
    assert all(torch.equal(p, q) for p, q in zip(first[0], second[0]))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", ["fp32", "int8+ecc"])
def test_writes_only_its_own(name, kind):
    buffers = [weights_of(kind, 1500, seed=s) for s in (1, 2)]
    kept = [b.clone() for b in buffers]
    parts = [slice(100, 1237), slice(1, 34)]
    params = [b[part] for b, part in zip(buffers, parts)]
    states = [init_state(p, kind) for p in params]
    canaries = []
    for s in states:                                           # each state tensor inside a larger one
        for field, x in s.items():
            around = torch.full((x.numel() + 64,), 77, dtype=x.dtype, device=DEVICE)
            s[field] = around[32:-32].view(x.shape).zero_()
            canaries.append(around)
    with backend.using(name):
        adamw_(params, [torch.ones_like(p) for p in params], states, LR, BETAS, EPS, DECAY, 1)
    for buffer, before, part in zip(buffers, kept, parts):
        assert not (buffer[part] == before[part]).all()
        assert torch.equal(buffer[:part.start], before[:part.start])
        assert torch.equal(buffer[part.stop:], before[part.stop:])
    assert all((x[:32] == 77).all() and (x[-32:] == 77).all() for x in canaries)


@pytest.mark.parametrize("kind", ["fp32", "int8+ecc"])
def test_offsets_beyond_int32(kind):
    """A tensor's 2^31st element and on: the table has the address that element 0 would have."""
    begin, n = 2**31 + adamw.CHUNK, 3000
    expected, grad = weights_of(kind, n), normal(n, seed=1)
    param, here = expected.clone(), init_state(expected, kind)
    there = init_state(expected, kind)
    with backend.using("triton"):
        adamw_([expected], [grad], [here], LR, BETAS, EPS, DECAY, 1)
        send = adamw.send_table

        def far(*given):
            size, _, *addresses = send(*given)[0][0].tolist()
            tensors = (param, grad, *(there.get(name) for name in ("m", "v", "m_scale", "v_scale", "ecc")))
            sizes = [0 if x is None else x.element_size() for x in tensors]
            per_group = [1] * 4 + [32] * 2 + [1]
            addresses = [a and a - begin * s // g for a, s, g in zip(addresses, sizes, per_group)]
            row = torch.tensor([[size + begin, -begin // adamw.CHUNK, *addresses]], device=DEVICE)
            return row, torch.zeros(1, dtype=torch.int32, device=DEVICE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adamw, "send_table", far)
            adamw_([param], [grad], [there], LR, BETAS, EPS, DECAY, 1)
    assert torch.equal(param, expected)
    assert all(torch.equal(x, y) for x, y in zip(there.values(), here.values()))


# ---- arguments

def test_table_is_sent_when_something_moved(monkeypatch):
    sent = []
    to_device = adamw.to_device
    monkeypatch.setattr(adamw, "to_device", lambda x, device: sent.append(x.shape) or to_device(x, device))
    params, grads = [normal(40), normal(9, 1000)], [normal(40), normal(9, 1000)]
    states, table = [init_state(p, "fp32") for p in params], {}
    with backend.using("triton"):
        for step, expected in ((1, 2), (2, 2), (3, 3), (4, 3)):   # addresses and owners; then addresses alone
            if step == 3:
                grads = [g.clone() for g in grads]
            adamw_(params, grads, states, LR, BETAS, EPS, DECAY, step, table=table)
            assert len(sent) == expected
        before = params[1].clone()
        adamw_(params, grads, states, LR, BETAS, EPS, 0.5, 5, table=table)                # another decay needs no table
        assert len(sent) == 3
        assert not torch.equal(before, params[1])
        adamw_(params[:1], grads[:1], states[:1], LR, BETAS, EPS, DECAY, 6, table=table)    # another list too
        assert len(sent) == 5


@pytest.mark.parametrize("name", BACKENDS)
def test_autograd_knows_that_it_wrote(name):
    param = normal(5).requires_grad_()
    y = (param * param).sum()
    with backend.using(name):
        adamw_([param], [normal(5, seed=1)], [init_state(param, "fp32")], LR, BETAS, EPS, DECAY, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.backward()


def test_nothing_to_do():
    for name in BACKENDS:
        with backend.using(name):
            adamw_([], [], [], LR, BETAS, EPS, DECAY, 1)
            empty = normal(0, 4)
            adamw_([empty], [empty], [init_state(empty, "int8")], LR, BETAS, EPS, DECAY, 1)


def test_state_shapes():
    for shape, scales in (((6, 64), (6, 2)), ((5, 33), (6,)), ((2, 3, 32), (2, 3, 1)), ((), (1,)), ((0,), (0,))):
        state = init_state(weights_of("int8+ecc", *shape), "int8+ecc")
        assert {k: (v.dtype, v.shape) for k, v in state.items()} == {
            "m": (torch.int8, shape), "v": (torch.uint8, shape), "m_scale": (torch.bfloat16, scales),
            "v_scale": (torch.float32, scales), "ecc": (torch.int8, shape)}
    assert list(init_state(normal(3), "fp32")) == ["m", "v"]


def test_bytes_of_the_docstring():
    param = weights_of("int8+ecc", 64, 64)
    held = sum(x.numel() * x.element_size() for x in init_state(param, "int8+ecc").values())
    assert 4 + held / param.numel() == 7.1875                   # with the bf16 weight and its gradient


@pytest.mark.parametrize(("change", "message"), [
    ({"kind": "int4"}, "'int4' does not fit"), ({"kind": "int8+ecc"}, "does not fit"),
    ({"grads": []}, "0 gradients"), ({"step": 0}, "first step is 1"), ({"grads": [torch.zeros(3)]}, "must agree"),
    ({"params": [torch.zeros(4, 4).T]}, "not contiguous"),
    ({"params": [torch.zeros(4, 4).bfloat16()]}, "does not fit")])
def test_mistakes_are_named(change, message):
    param = torch.zeros(4, 4)
    given = {"params": [param], "grads": [torch.zeros(4, 4)], "step": 1}
    given |= change

    def use():
        states = [init_state(param, given.get("kind", "int8"))]
        adamw_(given["params"], given["grads"], states, LR, BETAS, EPS, DECAY, given["step"])
    with pytest.raises(ValueError, match=message):
        use()


# ---- eight bits

def test_codes_are_within_half_a_step():
    """A rounding moves the root of |x| by half of 1/127 and so x by 2 sqrt(|x|) / 254 + 1 / 254^2; v alike."""
    x = torch.cat([normal(3200), normal(320, scale=1e-12), torch.zeros(64, device=DEVICE)])
    code, scale = adamw.encode_m(x)
    largest = x.view(-1, 32).abs().amax(1)
    assert (scale.double() >= largest).all()
    assert (scale.double() <= largest * (1 + 2.0**-7)).all()
    wide = scale.double().repeat_interleave(32)
    bound = (2 * (x.double().abs() * wide).sqrt() / 254 + wide / 254**2) * 1.0001
    assert ((adamw.decode_m(code, scale) - x.double()).abs() <= bound).all()
    code, scale = adamw.encode_v(x * x)
    wide = scale.double().repeat_interleave(32)
    root = adamw.decode_v(code, scale).double().sqrt()
    bound = (2 * (x.double().abs() * wide).sqrt() / 510 + wide / 255**2) * 1.0001
    # decoded v may be below the smallest fp32 number; codes below 1 are 1, which is up to 1 / 255^2
    assert ((root - x.double().abs()).abs() <= bound + 1e-19).all()
    assert (code >= 1).all()


def uneven_gradients(n, steps, spread):
    """Of elements whose sizes differ by factors of e^spread, in the same groups; a mean of a tenth of the size."""
    size = torch.exp(normal(n, seed=9) * spread) * 1e-4
    return [(normal(n, seed=10 + s) + 0.1) * size for s in range(steps)]


def nmse(kind, gradients, betas):
    """Of the second half of the updates, against float64."""
    param = torch.zeros(len(gradients[0]), device=DEVICE)
    truth = torch_adamw(param, gradients, lr=1.0, betas=betas, decay=0.0)
    state, error, power = init_state(param, kind), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        before = param.clone()
        adamw_([param], [gradient], [state], 1.0, betas, EPS, 0.0, step)
        if step > len(gradients) // 2:
            update = truth[step - 1] - truth[step - 2]
            error, power = error + (param - before - update).square().sum(), power + update.square().sum()
    return (error / power).item()


@pytest.mark.parametrize(("beta2", "spread", "bound"), slow_except(
    [(0.95, 1.0, 0.005)], [(0.95, 0.1, 0.001), (0.999, 0.1, 0.002), (0.95, 1.0, 0.005), (0.999, 1.0, 0.01)], 3))
def test_error_of_the_updates(beta2, spread, bound):
    """FlashOptim (arXiv 2602.23349) asks of its kernels a normalised mean square error of at most 0.01 to 0.05."""
    gradients = uneven_gradients(2048, 100, spread)
    with backend.using("reference"):
        assert nmse("int8", gradients, (0.9, beta2)) < bound


def test_companding_is_better_than_the_paper(monkeypatch):
    """Against softsign for m and a plain square root for v, and against a v that may round to zero."""
    gradients = uneven_gradients(1024, 60, 1.0)
    ours = nmse("int8", gradients, BETAS)

    def encode_m(m):
        wide = m.view(-1, 32)
        scale = wide.abs().amax(1).clamp(min=1e-30)
        x = wide / scale[:, None]
        return (127 * 2 * x / (1 + x.abs())).round().to(torch.int8).view(-1), scale

    def decode_m(code, scale):
        z = code.view(-1, 32).float() / 127
        return (z / (2 - z.abs()) * scale[:, None].float()).view(-1)

    def encode_v(v, least=1):
        root = v.view(-1, 32).sqrt()
        scale = root.amax(1).clamp(min=1e-30)
        return (255 * root / scale[:, None]).round().clamp(min=least).to(torch.uint8).view(-1), scale

    def decode_v(code, scale):
        return (code.view(-1, 32).float() / 255 * scale[:, None]).square().view(-1)
    for function in (encode_m, decode_m, encode_v, decode_v):
        monkeypatch.setattr(adamw, function.__name__, function)
    with backend.using("reference"):
        paper = nmse("int8", gradients, BETAS)
        monkeypatch.setattr(adamw, "encode_v", lambda v: encode_v(v, least=0))
        zero = nmse("int8", gradients, BETAS)
    assert ours < 0.5 * paper
    assert 2 * paper < zero


@pytest.mark.parametrize("name", BACKENDS)
def test_a_small_second_moment_never_vanishes(name):
    """Beside one large gradient long ago, small ones: m has codes for them and v would have none. Updates stay below
    a few rates where they would be m / eps."""
    param, state = torch.zeros(32, device=DEVICE), init_state(torch.zeros(32, device=DEVICE), "int8")
    once, small = torch.zeros(32, device=DEVICE), torch.full((32,), 4e-9, device=DEVICE)
    once[0], small[0] = 1e-2, 0.0
    with backend.using(name):
        for step in range(1, 50):
            grad = once if step == 1 else small if 40 <= step < 45 else 0 * small
            before = param.clone()
            adamw_([param], [grad], [state], 1.0, BETAS, 1e-16, 0.0, step)
            assert (param - before).abs().max() < 5
    assert state["m"].ne(0).all()


def test_second_moment_comes_down_again():
    """With beta2 = 0.999 a step changes sqrt(v) by 0.05 %; a scale of 16 bits would never see it."""
    param = torch.zeros(64, device=DEVICE)
    state, grad = init_state(param, "int8"), normal(64)
    with backend.using("reference"):
        adamw_([param], [grad], [state], LR, (0.9, 0.999), EPS, 0.0, 1)
        before = adamw.decode_v(state["v"], state["v_scale"].view(-1))
        for step in range(2, 502):
            adamw_([param], [grad * 0], [state], LR, (0.9, 0.999), EPS, 0.0, step)
    ratio = adamw.decode_v(state["v"], state["v_scale"].view(-1)) / before
    assert (ratio / 0.999**500 - 1).abs().max() < 1e-3


def train(kind, steps=100):
    """Loss of a small network that learns a random one; full batches."""
    x, true = normal(256, 32), [normal(64, 32, seed=1, scale=0.2), normal(8, 64, seed=2, scale=0.3)]

    def output(layers):
        return torch.tanh(x @ layers[0].T) @ layers[1].T
    y = output(true)
    bf16 = "+" in kind
    params = [normal(*p.shape, seed=20 + i, scale=0.2, dtype=torch.bfloat16 if bf16 else torch.float32)
              for i, p in enumerate(true)]
    states = [init_state(p, kind) for p in params]
    for step in range(1, steps + 1):
        leaves = [p.float().requires_grad_() for p in params]
        loss = (output(leaves) - y).square().mean()
        adamw_(params, list(torch.autograd.grad(loss, leaves)), states, 3e-3, (0.9, 0.95), EPS, 0.01, step)
    return (output([exact(p, s) for p, s in zip(params, states)]) - y).square().mean().item()


def test_training_reaches_the_same_loss():
    with backend.using("reference"):
        start, plain = train("fp32", 0), train("fp32")
        assert plain < 0.1 * start
        for kind in ("int8", "int8+ecc", "fp32+ecc"):
            assert train(kind) == pytest.approx(plain, rel=0.05), kind


# ---- weights in bf16

def test_split_and_join():
    x = torch.cat([normal(4096), normal(4096, seed=1, scale=1e-20), normal(512, scale=1e-40),
                   torch.tensor([0.0, -0.0, 1.0, 2.0 - 2.0**-23, -1.0 + 2.0**-24, 3e38, -3e38], device=DEVICE)])
    w, ecc = split(x)
    assert (w.dtype, ecc.dtype) == (torch.bfloat16, torch.int8)
    back = join(w, ecc)
    normal_numbers = x.abs() > 1e-37
    assert ((back - x).abs() <= 2.0**-16 * x.abs())[normal_numbers].all()
    assert ((back.double() - x).abs() <= 2.0**-149 * 128).logical_or(normal_numbers).all()
    assert ((w.double() - back).abs() <= 2.0**-8 * back.double().abs() + 2.0**-133).all()      # bf16 is the nearest
    again = split(back)
    assert torch.equal(again[0], w)
    assert torch.equal(again[1], ecc)
    assert torch.equal(join(w, torch.zeros_like(ecc)), w.float())      # a fresh state is the bf16 weight itself


@pytest.mark.parametrize("name", BACKENDS)
def test_error_correction_keeps_updates_that_bf16_loses(name):
    """Twenty steps of about 2^-11 of the weight: bf16 loses them; with ecc a step rounds by 2^-16 at most."""
    steps, lr = 20, 2.0**-11
    start = (1 + torch.rand(2000, generator=torch.Generator().manual_seed(0))).to(DEVICE, torch.bfloat16)
    full, param, plain = start.float(), start.clone(), start.clone()
    states = [init_state(full, "fp32"), init_state(param, "fp32+ecc"), init_state(full, "fp32")]
    with backend.using(name):
        for step in range(1, steps + 1):
            grad = normal(2000).sign() + normal(2000, seed=step, scale=0.3)
            adamw_([full, param], [grad, grad], states[:2], lr, BETAS, EPS, DECAY, step)
            wide = plain.float()
            adamw_([wide], [grad], states[2:], lr, BETAS, EPS, DECAY, step)
            plain = wide.bfloat16()
    error = (exact(param, states[1]) / full - 1).abs()
    assert error.max() <= steps * 2.0**-16
    assert error.square().mean().sqrt() <= math.sqrt(steps) * 2.0**-16
    assert (plain == start).float().mean() > 0.9
    assert ((full - start.float()).abs() > 10 * lr).all()

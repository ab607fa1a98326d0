"""Truths: each formula in numpy, eval.py's score of what was exported. Law: the ends of a merge are the models."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from runs import one, settings
from safetensors.torch import load_file
from torch import nn

import hf
import tokenizer
import train
from core import checkpoint
from learn import merge
from learn.schedules import ScheduleConfig, learning_rate

ODD = torch.tensor([[-0.0, 1.0, -3.5], [1e-30, 2.0, 65504.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "density"), [("linear", 0.2), ("slerp", 0.2), ("ties", 1.0)])
def test_the_ends_of_a_merge_are_the_models(method, density, dtype):
    def raw(x):
        return x.contiguous().view(torch.uint8)
    base, result = ODD.to(dtype), (ODD.flip(0) * 1.7).to(dtype)
    assert torch.equal(raw(merge.merge_tensor(base, result, 0.0, method, density)), raw(base))
    assert torch.equal(raw(merge.merge_tensor(base, result, 1.0, method, density)), raw(result))
    assert torch.equal(raw(merge.merge_tensor(base, result, 0, "ties", 0.3)), raw(base))
    wide = merge.merge_tensor(base, result.float(), 0.0, method, density)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, base.float())


def test_between_the_ends():
    generator = np.random.default_rng(0)
    base, change = generator.normal(size=(2, 8, 5))
    result = base + 0.01 * change                            # as near as training leaves them
    ours = {method: merge.merge_tensor(*map(torch.from_numpy, (base, result)), 0.3, method, 0.25).numpy()
            for method in ("linear", "slerp", "ties")}
    np.testing.assert_allclose(ours["linear"], 0.7 * base + 0.3 * result, rtol=1e-13)
    u, v = base / np.linalg.norm(base), result / np.linalg.norm(result)
    angle = math.acos((u * v).sum())
    by_formula = (math.sin(0.7 * angle) * base + math.sin(0.3 * angle) * result) / math.sin(angle)
    np.testing.assert_allclose(ours["slerp"], by_formula, rtol=1e-8)
    largest = np.argsort(np.abs(result - base).ravel())[-10:]            # a quarter of 40
    wanted = base.ravel().copy()
    wanted[largest] += 0.3 * (result - base).ravel()[largest]
    np.testing.assert_allclose(ours["ties"], wanted.reshape(base.shape), rtol=1e-13)


@pytest.mark.usefixtures("quick")
def test_the_mean_of_a_constant_runs_checkpoints_is_a_linear_decay_of_its_updates(lab, tmp_path):
    """WSM (arXiv 2507.17634, Theorem 3.1): the mean of the checkpoints 3 to 8 has every update of the run, times what a
    rate that falls linearly over the last 6 of 9 steps would have given it: 5/6, 4/6, ..., 0. Merging the checkpoints
    one after the other, the k-th with the coefficient 1/k, makes this mean."""
    STEPS, FALL = 9, 6
    c = settings(lab, tmp_path / "run", "--optim.schedule", "constant", "--train.save-every", 1, "--train.keep", STEPS,
                 steps=STEPS)
    train.train(c, one())
    weights = {step: checkpoint.load(checkpoint.path_of(tmp_path / "run/checkpoints", step))[0]
               for step in range(1, STEPS + 1)}
    falling = ScheduleConfig(lr=c.optim.lr, min_lr=0, schedule="wsd", warmup_steps=0, decay="linear",
                             decay_ratio=FALL / STEPS)
    shares = [learning_rate(step, STEPS, falling) / c.optim.lr for step in range(STEPS)]
    assert shares == pytest.approx([1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    for name in weights[1]:
        run = [weights[step][name].double() for step in range(1, STEPS + 1)]
        mean = run[STEPS - FALL - 1]
        for k, later in enumerate(run[STEPS - FALL:STEPS - 1], start=2):
            mean = merge.merge_tensor(mean, later, 1 / k)
        decayed = run[0] + sum(shares[step] * (run[step] - run[step - 1]) for step in range(1, STEPS))
        torch.testing.assert_close(mean, decayed, rtol=0, atol=1e-13, msg=name)
        assert (mean - run[-1]).abs().max() > 1e-4 * run[-1].abs().max(), name


def test_ties_keeps_the_nearest_number_of_changes_and_at_least_one():
    """Of 13 changes a share of 0.2 is 2.6, so 3; a share of 0.01 is none, so 1."""
    change = torch.arange(13.0) + 1
    for density, kept in ((0.2, 3), (0.19, 2), (0.01, 1)):
        merged = merge.merge_tensor(torch.zeros(13), change, 1.0, "ties", density)
        assert torch.equal(merged, torch.where(change > 13 - kept, change, 0)), density


def test_slerp_keeps_the_length_and_goes_straight_where_there_is_no_arc():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    middle = merge.merge_tensor(a, b, 0.5, "slerp")
    torch.testing.assert_close(middle, torch.tensor([3.0, 3.0]) / math.sqrt(2))
    for other in (2 * a, -a, torch.zeros(2)):
        torch.testing.assert_close(merge.merge_tensor(a, other, 0.25, "slerp"), 0.75 * a + 0.25 * other)


def test_rows_that_only_the_result_has_are_its_own():
    base, result = torch.zeros(2, 3), torch.ones(4, 3)
    for method in ("linear", "ties", "slerp"):
        merged = merge.merge_tensor(base, result, 0.5, method, 1.0)
        assert torch.equal(merged, torch.tensor([0.5, 0.5, 1.0, 1.0])[:, None].expand(4, 3))


def tensors_of(folder) -> dict:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_merged_folders_have_the_bits_of_their_ends(pair, tmp_path, forget_py, capsys, method):
    base, result = (tensors_of(folder) for folder in pair[:2])
    assert len(list(pair[1].glob("*.safetensors"))) > 1, "the result is in several files"
    for alpha, truth in ((0, base), (1, result)):
        out = tmp_path / f"{alpha}"
        assert forget_py("merge", "--base", pair[0], "--model", pair[1], "--alpha", alpha, "--method", method,
                         *(["--density", 1] if method == "ties" else []), "--out", out) == 0
        merged = tensors_of(out)
        assert merged.keys() == truth.keys()
        assert all(torch.equal(merged[name], truth[name]) for name in truth)
        loaded = hf.load(out)
        assert torch.equal(loaded.head.weight, truth["lm_head.weight"])
    assert not list(tmp_path.glob("*.tmp*"))
    assert tokenizer.load(out).encode("notice") == tokenizer.load(pair[1]).encode("notice")
    assert "coefficient 1" in (out / "README.md").read_text()
    assert forget_py("merge", "--base", pair[0], "--model", pair[1], "--alpha", 1, "--out", out) == 2
    assert "exists" in capsys.readouterr().err


def test_the_sweep_exports_the_best_of_two_texts(pair, tmp_path, forget_py, monkeypatch, capsys):
    import eval as evaluation
    out, file = tmp_path / "best", tmp_path / "sweep.json"
    words = ["merge", "--base", pair[0], "--model", pair[1], "--domain", pair[2], "--general", pair[3], "--out", out,
             "--documents", "line", "--json", file, "--alphas", 1, 0, 0.5, 0.25]
    assert forget_py(*words) == 0
    found = json.loads(file.read_text())
    assert [row["alpha"] for row in found["rows"]] == [0, 0.25, 0.5, 1]
    scores = [row["score"] for row in found["rows"]]
    assert (found["rows"][0]["domain_gain"], found["rows"][0]["forgetting"], scores[0]) == (0, 0, 0)
    assert found["rows"][3]["domain_gain"] > 0.05 < found["rows"][3]["forgetting"], "a real shift"
    assert found["alpha"] == found["rows"][scores.index(max(scores))]["alpha"]
    assert "(best)" in capsys.readouterr().out
    # the exported folder, scored by eval.py from the disk, is the row that was chosen
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", str(out), "--text", f"d={pair[2]}", "--text",
                                      f"g={pair[3]}", "--documents", "line", "--json", str(tmp_path / "eval.json")])
    assert evaluation.main() == 0
    scored = json.loads((tmp_path / "eval.json").read_text())["texts"]
    best = found["rows"][scores.index(max(scores))]["texts"]
    assert scored["d"]["bits_per_byte"] == pytest.approx(best[str(pair[2])]["bits_per_byte"], rel=1e-6)
    assert scored["g"]["bits_per_byte"] == pytest.approx(best[str(pair[3])]["bits_per_byte"], rel=1e-6)
    by_hand = {name: torch.lerp(t, tensors_of(pair[1])[name], found["alpha"])
               for name, t in tensors_of(pair[0]).items()}
    for name, tensor in tensors_of(out).items():
        torch.testing.assert_close(tensor, by_hand[name])


def test_merging_a_grown_vocabulary(pair, tmp_path):
    grown = hf.load(pair[1])
    grown.config.vocab_size += 2
    for module in (grown.embed_tokens, grown.head):
        module.weight = nn.Parameter(torch.cat([module.weight.detach(), torch.full((2, 32), 7.0)]))
    hf.save(grown, tmp_path / "grown", tokenizer=pair[1])
    merge.merge(pair[0], tmp_path / "grown", tmp_path / "out", 0.0, merge.MergeConfig("linear"))
    merged, base = tensors_of(tmp_path / "out"), tensors_of(pair[0])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged[name][:-2], base[name])
        assert (merged[name][-2:] == 7).all()
    assert hf.load(tmp_path / "out").config.vocab_size == grown.config.vocab_size
    with pytest.raises(ValueError, match="only in the result"):
        merge.merge(tmp_path / "grown", pair[0], tmp_path / "back", 0.5, merge.MergeConfig("linear"))
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob("*.tmp*"))


def test_models_that_do_not_fit(pair, tmp_path, hf_model):
    _, other = hf_model("qwen2")
    with pytest.raises(ValueError, match="one architecture"):
        merge.merge(pair[0], other, tmp_path / "out", 0.5, merge.MergeConfig("linear"))


@pytest.mark.parametrize(("words", "says"), [
    ([], "name either"),
    (["--alpha", "0.5", "--domain", "a", "--general", "b"], "name either"),
    (["--domain", "a"], "name either"),
    (["--domain", "a", "--general", "a"], "only one of them"),
    (["--alpha", "0.5", "--alphas", "0.1"], "nothing to try"),
    (["--domain", "nowhere.txt", "--general", "b"], "nowhere.txt"),
    (["--alpha", "1.5"], "alpha is 1.5"),
    (["--alpha", "0.5", "--method", "none"], "merges nothing"),
    (["--alpha", "0.5", "--density", "0", "--method", "ties"], "density is 0"),
    (["--alpha", "0.5", "--density", "0.5"], "--method ties keeps, and it is linear"),
    (["--alphas", "0.5", "2", "--domain", "a", "--general", "b"], "alphas is 2"),
    (["--alpha", "0.5", "--model", "nowhere"], "nowhere does not exist"),
])
def test_mistakes_of_a_merge_are_one_line(pair, tmp_path, forget_py, capsys, words, says):
    assert forget_py("merge", "--base", pair[0], "--model", pair[1], "--out", tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""stages/refuse.py: settings that cannot go together are refused before anything is read; each kind has more tests
with the part that it belongs to."""

import pytest
from runs import settings

from core.errors import UserError
from model import ModelConfig
from stages.refuse import refuse_combinations, refuse_sharing, refuse_stops


@pytest.mark.parametrize(("words", "ranks", "said"), [
    (["--train.batch-size", 6], 4, "train.batch_size 6 is not a multiple of the 4 ranks"),
    (["--parallel.replicas", 2], 4, "set --parallel.strategy fsdp"),
    (["--parallel.strategy", "fsdp", "--parallel.replicas", 3], 4, "does not part 4 ranks"),
    (["--lora.rank", 4], 1, "model.init scratch has none"),
    (["--model.num-key-value-heads", 3], 1, "is not a multiple of the model.num_key_value_heads 3"),
    (["--train.branch-from", "nowhere"], 1, "nowhere does not exist"),
    (["--model.recompute-every", 2], 1, "nothing is recomputed, so it would do nothing"),
    (["--parallel.offload"], 1, "set --parallel.strategy fsdp"),
])
def test_what_is_refused(tmp_path, words, ranks, said):
    with pytest.raises(UserError, match=said):
        refuse_combinations(settings(tmp_path, tmp_path / "run", *words), ranks)


@pytest.mark.parametrize(("words", "said"), [
    (["--parallel.context", 3], "data.context 32 is not a multiple of 6: parallel.context 3"),
    (["--parallel.context", 8, "--parallel.exchange", "heads"], "divides the 4 heads, and divides the 2 key-value"),
    (["--parallel.context", 4, "--parallel.tensor", 2, "--parallel.exchange", "heads"], "the 2 heads that parallel"),
    (["--parallel.context", 4, "--objective.name", "dpo"], "objective dpo needs sequences as a whole"),
    (["--parallel.tensor", 4], "parallel.tensor 4 does not divide 2, the key-value heads"),
    (["--parallel.tensor", 2, "--lora.rank", 4, "--lora.base", "nf4"], "lora.base nf4 has blocks of 64, and"),
    (["--parallel.tensor", 2, "--optim.name", "adamw_8bit"], "parts layers of 32 and 64 inputs within them"),
])
def test_what_cannot_be_shared(tmp_path, words, said):
    c = settings(tmp_path, tmp_path / "run", *words)
    with pytest.raises(UserError, match=said):
        refuse_sharing(c, ModelConfig(50, 32, 64, 2, 4, 2))


def test_what_can_be_shared(tmp_path):
    for words in (["--parallel.context", 4], ["--parallel.context", 8],
                  ["--parallel.context", 4, "--parallel.tensor", 2],
                  ["--parallel.tensor", 2, "--objective.name", "span"]):
        refuse_sharing(settings(tmp_path, tmp_path / "run", *words), ModelConfig(50, 32, 64, 2, 4, 2))


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 4.0},
                                  {"rope_type": "longrope", "original_max_position_embeddings": 16, "factor": 4.0,
                                   "attention_factor": 1.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}])
def test_ranks_that_share_sequences_turn_positions_alike(tmp_path, rope):
    """Dynamic scaling and longrope ask for the length of the sequence, of which a rank sees its own part alone."""
    c = settings(tmp_path, tmp_path / "run", "--parallel.context", 2)
    with pytest.raises(UserError, match="positions beyond 16 by the length of the sequence"):
        refuse_sharing(c, ModelConfig(50, 32, 64, 2, 4, 2, max_position_embeddings=16, rope_scaling=rope))
    # Up to the length that the base was trained for, they are turned as without a scaling.
    rope = {**rope, "original_max_position_embeddings": 32}
    refuse_sharing(c, ModelConfig(50, 32, 64, 2, 4, 2, max_position_embeddings=32, rope_scaling=rope))


@pytest.mark.parametrize(("words", "steps", "fits"), [
    # Evaluations before the steps 0, 4, 8, 12 and 16, of which those from step 4 on count: a fifth of the run.
    (["--eval.stop-gain", 0.1], 20, True), (["--eval.stop-gain", 0.1, "--eval.stop-patience", 4], 20, False),
    (["--eval.stop-gain", 0.1, "--eval.stop-after", 9], 20, False),
    (["--eval.stop-forgetting", 0.1, "--eval.stop-after", 9], 20, True),
    (["--eval.stop-forgetting", 0.1, "--eval.stop-after", 13], 20, False),
    (["--eval.stop-forgetting", 0.1, "--eval.stop-after", 20], 20, False),
    # At step 0 nothing is forgotten yet.
    (["--eval.stop-forgetting", 0.1, "--eval.stop-after", 0], 12, True),
    (["--eval.stop-forgetting", 0.1, "--eval.stop-after", 0], 8, False)])
def test_a_rule_has_evaluations_enough_that_count(tmp_path, words, steps, fits):
    c = settings(tmp_path, tmp_path / "run", "--eval.every", 4, *words)
    if fits:
        refuse_stops(c, {"domain", "general"}, steps)
    else:
        with pytest.raises(UserError, match=r"from step \d+ on \(eval.stop_after\)"):
            refuse_stops(c, {"domain", "general"}, steps)

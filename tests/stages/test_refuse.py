"""stages/refuse.py: settings that cannot go together are refused before anything is read; each kind has more tests
with the part that it belongs to."""

import pytest
from runs import settings

from core.errors import UserError
from stages.refuse import refuse_combinations


@pytest.mark.parametrize(("words", "ranks", "said"), [
    (["--train.batch-size", 6], 4, "train.batch_size 6 is not a multiple of the 4 ranks"),
    (["--parallel.replicas", 2], 4, "set --parallel.strategy fsdp"),
    (["--parallel.strategy", "fsdp", "--parallel.replicas", 3], 4, "does not part 4 ranks"),
    (["--lora.rank", 4], 1, "model.init scratch has none"),
    (["--model.num-key-value-heads", 3], 1, "is not a multiple of the model.num_key_value_heads 3"),
    (["--train.branch-from", "nowhere"], 1, "nowhere does not exist"),
])
def test_what_is_refused(tmp_path, words, ranks, said):
    with pytest.raises(UserError, match=said):
        refuse_combinations(settings(tmp_path, tmp_path / "run", *words), ranks)

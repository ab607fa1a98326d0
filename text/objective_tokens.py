"""The special tokens that objectives need, by the names under which models have them.

Text never holds them: an objective puts them between a text's parts. `tokenizer.py add --for OBJECTIVE` gives them to a
vocabulary that has none, and a tokenizer that has them under any of these names is used as it is.
"""

from core.errors import UserError
from text.vocabulary import Tokenizer

# What stands for a masked token, where no file names the mask token: RoBERTa's name (the one that is added), BERT's.
MASKS = [("<mask>",), ("[MASK]",), ("<|mask|>",)]
# T5's sentinel of the span with this number
SENTINEL = "<extra_id_{}>"
# What stands before prefix, suffix and middle: Qwen's (which are added), StarCoder's, Code Llama's, DeepSeek's
PARTS = [("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
         ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), ("▁<PRE>", "▁<SUF>", "▁<MID>"),
         ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")]
# UL2's modes: R, regular spans; S, the end; X, many or long spans. The second names are those of google/ul2.
MODES = [("[R]", "[S]", "[X]"), ("[NLU]", "[S2S]", "[NLG]")]


def find_named(tokenizer: Tokenizer, families: list[tuple[str, ...]]) -> list[int] | None:
    """The ids of the first of `families` whose tokens are all in the vocabulary."""
    known = [names for names in families if all(name in tokenizer.vocab for name in names)]
    return [tokenizer.vocab[name] for name in known[0]] if known else None


def find_mask(tokenizer: Tokenizer) -> int | None:
    found = find_named(tokenizer, MASKS)
    return tokenizer.mask_id if tokenizer.mask_id is not None else found and found[0]


def find_sentinels(tokenizer: Tokenizer) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ... as far as they go without a gap."""
    found = []
    while (i := tokenizer.vocab.get(SENTINEL.format(len(found)))) is not None:
        found.append(i)
    return found


def list_missing(tokenizer: Tokenizer, objectives: list[str], sentinels: int) -> tuple[list[str], str | None]:
    """(the special tokens that `objectives` need and the vocabulary lacks, which of them becomes the mask token)."""
    tokens, mask = [], None
    if "masked" in objectives and find_mask(tokenizer) is None:
        mask = MASKS[0][0]
        tokens.append(mask)
    if {"span", "ul2"} & {*objectives}:
        tokens += map(SENTINEL.format, range(len(find_sentinels(tokenizer)), sentinels))
    for objective, families in (("ul2", MODES), ("fim", PARTS)):
        if objective in objectives and find_named(tokenizer, families) is None:
            tokens += families[0]
    return tokens, mask


def refuse_missing(objective: str, what: str):
    """UserError that names the command which adds the tokens."""
    raise UserError(f"objective {objective} needs {what} and the tokenizer has none; python tokenizer.py add --model "
                    f"DIR --for {objective} --out DIR2 makes a base that has them, with which the text is packed")

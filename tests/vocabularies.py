"""What the tests of vocabularies share: small bases to extend, real ones, and hostile strings."""

import json
import random
from pathlib import Path

import sentencepiece

from text.train_vocabulary import train
from text.vocabulary_files import BaseTokenizer, convert

BASES = {"gpt2": "tokenizers/gpt2", "phi2": "tokenizers/phi2_bytebpe_hf", "llama3": "tokenizers/llama3_tiktoken",
         "llama2": "tokenizers/llama2_spm", "stories": "models/stories260K"}
SMALL = ("small bytes", "small pieces", "small json")  # trained here, for a checkout without NANOCPT_DATA
LATIN = ("The tenant shall not be liable for rent during the tenancy. An estate, the executor of the estate and the "
         "trustee's beneficiary; (a)(1) the decedent's heirs-at-law, per stirpes. § 16–4711 ¶ 2. ")


def fuzz(n: int, seed: int = 0) -> list[str]:
    """Strings of many scripts, code, white space, combining marks, emoji, half surrogates, U+2581, NUL, long runs."""
    rng = random.Random(seed)
    atoms = ["liable", " liable", "beneficiary", "decedent", " of", " the", "Estate", "\n", "\r\n", "\t", " ", "  ",
             "    ", "\xa0", "\u3000", "\u200d", "\x00", "\x85", "é", "e\u0301", "ß", "Ж", "שָ", "漢字", "한국", "हिन्दी",
             "🙂", "\U0001f469\u200d\U0001f4bb", "\ud800", "\u2581", "12345", "§ 16–4711", "x = 1;", "def f():",
             "DON'T", "it's", "----", "a" * 9, "(a)(1)", "http://x.y/z?q=1", "<0x41>", "\ufffd", "ǅ", "ﬁ", "ไทย", "^^^"]
    texts = ["".join(rng.choice(atoms) for _ in range(rng.randrange(1, 30))) for _ in range(n)]
    texts += ["x" + character * n + "y" for character in " a-=\n\t^_" for n in (3, 7, 17, 22, 41, 90)]   # equal ranks
    return texts + ["".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(1, 0x3000)))) for _ in range(40))
                    for _ in range(n)]


def make_small_bases(folder: Path) -> dict[str, Path]:
    """Folders of small bases: a byte-level tokenizer.json; a SentencePiece BPE as tokenizer.model and as .json."""
    train([LATIN[:90] * 3], "bpe", 300, folder / "bytes")
    (folder / "pieces").mkdir()
    with open(folder / "pieces/tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([LATIN[:90]] * 3), model_writer=f, model_type="bpe", vocab_size=310,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
            minloglevel=2)
    save_as_phi3(folder / "pieces", folder / "json")
    return {"small bytes": folder / "bytes", "small pieces": folder / "pieces", "small json": folder / "json"}


def save_as_phi3(path: Path, folder: Path) -> None:
    """Write a SentencePiece BPE in the form of Phi-3's and Llama 2's tokenizer.json, with no tokenizer.model beside it:
    the normaliser puts "▁" before the text, and there is no pre-tokenizer."""
    base = BaseTokenizer(path)
    folder.mkdir()
    convert(base, base.tokenizer.tokens, []).save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
             "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))

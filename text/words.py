"""Which tokens begin a word, from the pieces of the tokenizer itself: SentencePiece, byte-level BPE or WordPiece.

A word is a run of letters and digits with the white space before it; a punctuation mark, an ideograph and a kana are
words of their own, as in BERT. WordPiece marks what continues a word ("##ing"). V vocabulary.
"""

import numpy as np

from text.vocabulary import LETTER_BYTES, Tokenizer
from text.vocabulary_files import BYTE_NAME


def spell_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """What each token spells, its white space included; b"" for an unused id."""
    tokens = [token or "" for token in tokenizer.tokens]
    byte_level = sum(token.startswith("Ġ") for token in tokens) > sum(token.startswith("▁") for token in tokens)
    if byte_level:
        return [bytes(map(LETTER_BYTES.get, token)) if LETTER_BYTES.keys() >= {*token} else token.encode()
                for token in tokens]
    named = [BYTE_NAME.fullmatch(token) for token in tokens]
    return [bytes([int(name[1], 16)]) if name else token.replace("▁", " ").encode()
            for name, token in zip(named, tokens)]


def parts_words(byte: int) -> bool:
    """Whether the character whose UTF-8 begins with this byte belongs to no word of letters: all of ASCII but letters
    and digits; of the rest U+2000 to U+2FFF (punctuation, symbols), U+3000 to U+9FFF (kana, ideographs) and emoji."""
    return not chr(byte).isalnum() if byte < 0x80 else 0xE2 <= byte <= 0xE9 or byte >= 0xF0


def find_word_borders(tokenizer: Tokenizer, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(bool [V], whether a token begins a word; int8 [V], whether the next one does: 1, always; -1, never)."""
    begins, after = np.ones(vocab_size, bool), np.zeros(vocab_size, np.int8)
    is_wordpiece = type(getattr(tokenizer.backend, "model", None)).__name__ == "WordPiece"
    for i, spelt in enumerate(spell_bytes(tokenizer)[:vocab_size]):
        if is_wordpiece:
            begins[i] = not spelt.startswith(b"##")
        elif not spelt.strip(b" "):
            # Spaces belong to the word behind them.
            after[i] = -1
        else:
            # A token may hold a part of a character's bytes: what only goes on with it belongs to its word.
            begins[i] = not 0x80 <= spelt[0] < 0xC0 and parts_words(spelt[0])
            last = max((k for k, byte in enumerate(spelt) if not 0x80 <= byte < 0xC0), default=None)
            is_whole = last is not None and spelt[last:].decode(errors="ignore") != ""
            after[i] = is_whole and parts_words(spelt[last])
    return begins, after

"""Law: what is streamed is the decoded text up to a stop string, however its bytes are cut into tokens."""

import random

import pytest
import tokenizers
from synthetic import MIXED, ByteTokenizer

import tokenizer
from text.vocabulary import TextStream


def streamed(tok, prompt_ids, new_ids, stop=()):
    """(pieces written, text) of a TextStream that is fed until it says stop."""
    pieces = []
    stream = TextStream(tok, prompt_ids, stop, pieces.append)
    any(stream.push(token) for token in new_ids)
    assert stream.finish() == stream.text == "".join(pieces)
    return pieces, stream.text


def test_characters_are_written_whole():
    ids = ByteTokenizer().encode(MIXED)
    for split in range(10):
        pieces, text = streamed(ByteTokenizer(), ByteTokenizer().decode(ids[:split]).encode(errors="ignore"), ids)
        assert text.endswith(MIXED)
        assert "\ufffd" not in "".join(pieces[1:])
    pieces, _ = streamed(ByteTokenizer(), [], ids)
    assert len([piece for piece in pieces if piece]) == len(MIXED)       # each as soon as its last byte is there


def test_invalid_bytes_are_written_once_it_is_clear_that_they_are():
    source = random.Random(0)
    for _ in range(300):
        ids = [source.choice([0x41, 0x20, 0xc3, 0xa9, 0xe4, 0xb8, 0xad, 0xf0, 0x9f, 0x98, 0xff]) for _ in range(12)]
        cut = source.randrange(12)
        if ByteTokenizer().decode(ids[:cut]).endswith("\ufffd"):
            continue                                # a prompt is whole text
        assert streamed(ByteTokenizer(), ids[:cut], ids[cut:])[1] == ByteTokenizer().decode(ids)
    pieces, text = streamed(ByteTokenizer(), [], [0x41, 0xe4, 0xb8])
    assert (pieces, text) == (["", "A", "", "", "\ufffd"], "A\ufffd")


def test_byte_fallback_that_takes_back_a_whole_run_does_not_stop_the_stream(tmp_path):
    """`tokenizers` turns every byte of a run into U+FFFD while any part of the run is no character."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": 1 + b for b in range(256)}, "▁a": 257}
    lib = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    lib.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("▁", " "),
                                                tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    lib.save(str(tmp_path / "tokenizer.json"))
    tok = tokenizer.load(tmp_path)
    run = [1 + b for b in "中文🙂".encode()]
    pieces, text = streamed(tok, [257], run)
    assert text == " a中文🙂"
    assert [piece for piece in pieces if piece] == [" a", "中", "文", "🙂"]
    pieces, text = streamed(tok, [257], [*run, 1 + 0xe4, 257])
    assert text.startswith(" a中文🙂")
    assert text.endswith(" a")


def cut_at(text: str, prompt: int, stop) -> str:
    """The rule in words: read on until some stop string is complete; the text ends before it."""
    for end in range(prompt, len(text) + 1):
        for s in sorted(stop, key=len, reverse=True):
            if end - len(s) >= prompt and text[:end].endswith(s):
                return text[:end - len(s)]
    return text


def test_stop_strings_across_tokens():
    class Wide(ByteTokenizer):                              # ids from 1000 on are strings of several bytes
        vocab_size = 10_000

        def decode(self, ids):
            return b"".join(words[i - 1000] for i in ids).decode(errors="replace")

    source, words = random.Random(1), []
    for _ in range(500):
        text = "".join(source.choices("ab🙂", k=14)).encode()
        stop = ["".join(source.choices("ab🙂", k=source.randint(1, 5))) for _ in range(source.randint(1, 3))]
        prompt = "ab" * source.randint(0, 2)
        cuts = sorted(source.sample(range(1, len(text)), 4))
        words[:] = [prompt.encode(), *(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)]))]
        _, out = streamed(Wide(), [1000], range(1001, 1000 + len(words)), stop)
        assert out == cut_at(prompt + text.decode(), len(prompt), stop)
        assert "\ufffd" not in out
    with pytest.raises(ValueError, match="stop string is empty"):
        TextStream(ByteTokenizer(), [], [""])

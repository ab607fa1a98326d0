"""Truth: protobuf's own reader; the worked example in the file.
"""

import io

import pytest
from vocabularies import BASES, LATIN

from text import vocabulary_files as files
from text.extend_vocabulary import extend
from text.vocabulary_files import BaseTokenizer


def test_two_files_of_different_models_are_refused(small_bases, tmp_path):
    for kind, name in (("small bytes", "tokenizer.json"), ("small pieces", "tokenizer.model")):
        (tmp_path / name).write_bytes((small_bases[kind] / name).read_bytes())
    with pytest.raises(ValueError, match=r"has 300 ids in tokenizer\.json and 310 in tokenizer\.model"):
        BaseTokenizer(tmp_path)


def test_sentencepiece_file_goes_on_where_it_was(data_dir, tmp_path):
    """Old bytes in front; scores fall strictly below all old ones, even Llama 2's -1e9 where float32 steps by 64."""
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs protobuf")
    base, out = BaseTokenizer(data_dir / BASES["llama2"]), tmp_path / "out"
    new_pieces = len(extend(base.file, [LATIN] * 20, 40, out, min_count=3))
    old, new = base.file.read_bytes(), (out / "tokenizer.model").read_bytes()
    assert new.startswith(old)
    before, after = pb.ModelProto.FromString(old), pb.ModelProto.FromString(new)
    assert after.normalizer_spec == before.normalizer_spec
    assert after.trainer_spec.vocab_size == len(after.pieces) == len(before.pieces) + new_pieces
    scores = [p.score for p in after.pieces[len(before.pieces) - 1:]]
    scores[0] = min(p.score for p in before.pieces)
    assert scores == sorted(set(scores), reverse=True)
    assert {p.type for p in after.pieces[len(before.pieces):]} == {pb.ModelProto.SentencePiece.NORMAL}


def test_a_piece_in_protobufs_wire_format():
    written = files.write_field(1, files.write_field(1, b"ab") + files.write_field(2, -1.5) + files.write_field(3, 1))
    assert written == bytes.fromhex("0a0b 0a026162 150000c0bf 1801")
    assert files.read_fields(written) == [(1, written[2:])]
    assert files.read_fields(written[2:]) == [(1, b"ab"), (2, bytes.fromhex("0000c0bf")), (3, 1)]
    for value in (0, 127, 128, 300, 2**40):
        assert files.read_varint(io.BytesIO(files.write_varint(value) + b"?")) == value
    assert files.write_varint(300) == b"\xac\x02"                    # protobuf.dev, "Encoding"

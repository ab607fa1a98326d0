"""A larger vocabulary for a base model: new tokens behind all old ones, learned or named, their rows, and their worth.

`extend` continues BPE where the base stopped: the text is cut by the base tokenizer, and the most frequent adjacent
pair becomes one token, again and again. A character that SentencePiece's pieces lack, one token per byte until then,
becomes a token of its own as if its bytes were merged: it counts once for each token that it saves. Each new token
ranks behind every old one, so that new ones only join what the old ones left. Hence, for any text: every boundary
between new tokens is a boundary between old tokens, and text without new tokens keeps its ids. (A second tokenizer
trained on the text, minus the common tokens, has neither property: arXiv
2512.03989.) New ids begin behind the last special token; no old id moves.

    text "abab abab abc"   base: a b a b | a b a b | a b c      pairs: (a, b) 5, (b, a) 2, (b, c) 1
    1st merge (a, b) = X         X X | X X | X c                 pairs: (X, X) 2, (X, c) 1
    2nd merge (X, X) = Y         Y | Y | X c                     and so on until no pair occurs `min_count` times
"""

import collections
import heapq
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import regex
import torch

from core.cli import Reading
from core.config import setting
from core.errors import UserError
from core.files import write_text
from text.corpus import read_documents
from text.objective_tokens import list_missing
from text.train_vocabulary import count_text, cut_for_counting, hold_out
from text.vocabulary import TiktokenTokenizer, Tokenizer, load, measure_loss, replace_surrogates
from text.vocabulary_files import (
    BaseTokenizer,
    convert,
    encodes_as,
    keep_text_around,
    keeps_ids,
    write_extended,
    write_settings,
)

# The longest new token: bytes of a byte-level one, characters of a piece (SentencePiece's max_sentencepiece_length)
MAX_BYTES, MAX_CHARACTERS = 32, 16
# What a new SentencePiece piece may be. Its trainer starts none inside a word, mixes no scripts and splits digits.
SP_PIECE = regex.compile(r"▁?(?:\p{Latin}+|\p{Cyrillic}+|\p{Greek}+|[\p{L}\p{M}--\p{Latin}--\p{Cyrillic}--\p{Greek}]+"
                         r"|[^\p{L}\p{M}\p{N}▁\s]+)", regex.V1)
SP_UNIT = regex.compile(f"{SP_PIECE.pattern}|▁+|.", regex.V1 | regex.DOTALL)
# As many as there are code points: where words are strings, the symbol of -ord(c) is chr(SYMBOLS - ord(c)).
SYMBOLS = 0x110000
# Judgements: the least saving of tokens that pays for a new vocabulary; how often a trained row has been seen; and the
# share of a text's tokens, when they are single bytes, from which new rows pay however seldom they are seen: the base
# has hardly trained its bytes (docs/RESULTS.md, a larger vocabulary).
WORTH_IT, TIMES_SEEN, IN_BYTES = 0.15, 100, 0.9
# How far the rows of new control tokens are drawn apart, as a share of the old rows' deviation.
SPREAD = 0.1


@dataclass
class Learning:
    """What is learned from the text."""

    new_tokens: int = setting(2000, at_least=1)
    """How many new tokens to learn."""
    # On held-out law 4 makes at most 1.5 % more tokens than 2 does, of 10 to 45 % fewer rows; 10 makes 2 to 18 % more
    # than 4 (docs/RESULTS.md, a larger vocabulary).
    min_count: int = setting(4, at_least=1)
    """How often a pair must occur to be joined; a new character counts once per token that it saves."""


@dataclass
class NewRows:
    """How the rows of new ids are made, in each matrix from its own old rows."""

    init: Literal["subtoken", "subtoken_norm", "mean", "covariance", "zero", "random"] = "subtoken"
    """The mean of its parts' rows, the same at the old rows' norm, the mean of all, drawn around it, zero, random."""
    seed: int = 0
    """The seed of --init random and covariance."""


@dataclass(kw_only=True)
class Report:
    """Say how much shorter an extension makes text, and whether it is worth it."""

    tokenizer: str
    """The base: a folder or a file."""
    extended: str | None = None
    """The extension; by default one is learned from 9 in 10 domain documents."""
    domain: list[str]
    """Files of domain text."""
    general: list[str] = field(default_factory=list)
    """Files of general text."""
    code: list[str] = field(default_factory=list)
    """Files of code."""
    corpus_tokens: int | None = setting(None, at_least=1)
    """Tokens to train on, if more than those of the --domain files."""
    learning: Learning = field(default_factory=Learning)
    reading: Reading = field(default_factory=Reading)


def count_words(base: BaseTokenizer, texts) -> collections.Counter:
    """How often each word occurs: {ids of the word: count}. A word is what the tokenizer's own pattern cuts, and for
    SentencePiece's pieces a unit; in it a character c that the base spells in bytes is one entry, -ord(c)."""
    counts, tokenizer = collections.Counter(), base.tokenizer
    texts = itertools.chain.from_iterable(map(cut_for_counting, texts))
    if isinstance(tokenizer, TiktokenTokenizer):
        # A word on its own has the ids that it has in a text, so each distinct word is encoded once.
        strings = collections.Counter(word for text in texts for word in regex.findall(tokenizer.pattern, text))
        ids_of_words = tokenizer.encode_batch(list(strings))
        return collections.Counter({tuple(ids.tolist()): n for ids, n in zip(ids_of_words, strings.values())})
    for text in texts:
        if base.has_pieces:
            ids = base.name_characters(tokenizer.encode(text))
            starts = [k for k, i in enumerate(ids) if k == 0 or (i >= 0 and tokenizer.tokens[i].startswith("▁"))]
        else:
            encoding = tokenizer.backend.encode(text, add_special_tokens=False)
            ids, word_of = encoding.ids, encoding.word_ids
            starts = [k for k in range(len(ids)) if k == 0 or word_of[k] != word_of[k - 1] or word_of[k] is None]
        words = collections.Counter(tuple(ids[a:b]) for a, b in itertools.pairwise([*starts, len(ids)]))
        for word, n in words.items():
            for part in cut_into_units(base, word) if base.has_pieces else [word]:
                counts[part] += n
    return counts


def cut_into_units(base: BaseTokenizer, word: tuple[int, ...]):
    """Cut a word of pieces where no new piece can span: at old boundaries that are those of SP_UNIT too. In a script
    without spaces a word is a line, of which each merge would read all."""
    spelt = [base.spell_id(i) for i in word]
    ends = set(itertools.accumulate(map(len, SP_UNIT.findall("".join(spelt)))))
    cuts = [k for k, end in enumerate(itertools.accumulate(map(len, spelt)), 1) if end in ends]
    return (word[a:b] for a, b in itertools.pairwise([0, *cuts]))


def count_fewest_tokens(base: BaseTokenizer, texts) -> int:
    """The fewest tokens that any extension can make of `texts`: old tokens are joined within a word of `count_words`,
    never cut, and new ones are at most MAX_BYTES or MAX_CHARACTERS long."""
    fewest, most = 0, MAX_CHARACTERS if base.has_pieces else MAX_BYTES
    for word, n in count_words(base, texts).items():
        lengths = [len(base.spell_id(i)) for i in word]
        fewest += n * -(-sum(lengths) // max(most, *lengths))
    return fewest


def may_become_token(base: BaseTokenizer, token: str) -> bool:
    if not base.has_pieces:
        return len(token) <= MAX_BYTES
    frozen = any(piece in token for piece in base.frozen)
    fits = len(token) == 1 or (len(token) <= MAX_CHARACTERS and SP_PIECE.fullmatch(token) is not None)
    return fits and not frozen


def continue_bpe(words: collections.Counter, tokens: list, joinable: list, may_become, new_tokens: int,
                 min_count: int) -> list[tuple[int, ...]]:
    """Learn merges; return the pairs of ids that become the ids len(tokens), len(tokens) + 1, ...: each time the most
    frequent adjacent pair within a word, and among equals the one with the lowest ids, while one occurs `min_count`
    times. A character c that the base spells in bytes stands in a word as -ord(c), and is itself a "merge" (-ord(c),).
    `tokens`, `joinable` grow too. words: {ids: count}. may_become: (string) -> whether it may be a token."""
    known = set(filter(None, tokens))
    # A word is a string with a symbol per id, so that str.replace joins a pair, from the left, as BPE does. Symbols of
    # characters count down from the last code point, far above any id.
    lists, weights = ["".join(chr(i % SYMBOLS) for i in word) for word in words], list(words.values())
    # Per pair of symbols: how often it occurs, and in which words it is or was
    counts, where = collections.Counter(), collections.defaultdict(set)

    def count_pairs(w: int, sign: int):
        for pair in itertools.pairwise(lists[w]):
            counts[pair] += sign * weights[w]
            where[pair].add(w)

    for w, word in enumerate(words):
        count_pairs(w, 1)
        for i in word:
            if i < 0:
                counts[symbol := (chr(i % SYMBOLS),)] += weights[w] * (len(chr(-i).encode()) - 1)
                where[symbol].add(w)
    # A pair's count only falls after it was pushed, so an entry is at worst too high: then it is pushed anew.
    heap, merges = [(-n, pair) for pair, n in counts.items()], []
    heapq.heapify(heap)
    while heap and -heap[0][0] >= min_count and len(merges) < new_tokens:
        pushed, pair = heapq.heappop(heap)
        if counts[pair] != -pushed:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        # Once a character is a token it has another symbol.
        parts = tuple(ord(symbol) - SYMBOLS * (ord(symbol) >= len(tokens)) for symbol in pair)
        if len(parts) > 1 and not all(i >= 0 and joinable[i] for i in parts):
            continue
        union = "".join(tokens[i] if i >= 0 else chr(-i) for i in parts)
        if union in known or not may_become(union):
            continue
        new = chr(len(tokens))
        tokens.append(union)
        joinable.append(True)
        known.add(union)
        merges.append(parts)
        appeared = set()
        for w in where.pop(pair):
            count_pairs(w, -1)
            lists[w] = lists[w].replace("".join(pair), new)
            count_pairs(w, 1)
            appeared.update(other for other in itertools.pairwise(lists[w]) if new in other)
        for other in appeared:
            heapq.heappush(heap, (-counts[other], other))
    return merges


def extend(path, texts, new_tokens: int, folder, min_count: int = 4) -> dict[int, tuple[int, ...]]:
    """Write the tokenizer at `path`, continued on `texts`, into `folder`; -> {new id: the old ids that it joins}.
    UserError if the tokenizer cannot be continued or the texts hold no pair that occurs `min_count` times."""
    base, parts = BaseTokenizer(path), {}
    tokens, joinable, words = list(base.tokenizer.tokens), list(base.joinable), count_words(base, texts)
    if base.has_pieces and not base.byte_ids and any(base.tokenizer.unk_id in word for word in words):
        print("warning: the base has no pieces for bytes, so that characters which it lacks stay unknown; none of them "
              "is learned", file=sys.stderr)
    merges = continue_bpe(words, tokens, joinable, partial(may_become_token, base), new_tokens, min_count)
    if not merges:
        raise UserError(f"the text has no pair of tokens that may be joined and occurs {min_count} times; give more "
                        f"text or a lower --min-count")
    for i, pair in enumerate(merges, base.tokenizer.vocab_size):
        parts[i] = tuple(old for half in pair for old in parts.get(half) or base.list_old_ids(half))
    pairs = [(tokens[pair[0]], tokens[pair[1]]) for pair in merges if len(pair) == 2]
    write_extended(base, tokens, pairs, Path(folder))
    return parts


def add(path, terms: list[str], folder, special: bool = False, pad: str | None = None, objectives: list[str] = (),
        sentinels: int = 100) -> dict[int, list[int]]:
    """Give `terms`, the padding token `pad` and what `objectives` need and the vocabulary lacks one id each behind all
    others; -> {new id: the old ids of its text}. special: the terms are control tokens, as the others always are.
    Only tokenizer.json is written into `folder`: it alone can say how an added token is found, which is as it is spelt,
    anywhere in the text, before anything is joined, and so even inside words. The text around it stays as it is."""
    base = BaseTokenizer(path)
    old = base.tokenizer
    needed, mask = list_missing(old, objectives, sentinels)
    roles = {f"{role}_token": token for role, token in (("pad", pad), ("mask", mask)) if token is not None}
    control = {*needed, *roles.values(), *(terms if special else ())}
    wanted = [*terms, *needed, *([] if pad is None else [pad])]
    if pad is not None and old.pad_id is not None:
        raise UserError(f"the tokenizer has the pad token {old.tokens[old.pad_id]!r} already")
    if not wanted:
        raise UserError(f"there is nothing to add: the vocabulary has the tokens for {' and '.join(objectives)}"
                        if objectives else "there is no term to add; name some, or --pad TOKEN, or --for OBJECTIVE")
    for n, term in enumerate(wanted):
        if not term:
            raise UserError("a term is empty")
        if replace_surrogates(term) != term:
            raise UserError(f"the term {term!a} holds half a surrogate pair; spell it in UTF-8")
        if term in wanted[:n]:
            raise UserError(f"the term {term!r} is named twice")
        for spelling in (term, base.spell(term)):
            if spelling in old.vocab:
                raise UserError(f"the vocabulary spells the token {old.vocab[spelling]} as {spelling!r}, so that "
                                f"{term!r} has the id {old.vocab[spelling]} already; leave it out")
    backend = convert(base, old.tokens, [])
    if base.kind == "sentencepiece" and not encodes_as(base, backend, old):
        raise UserError(f"{base.file} has a normaliser that tokenizer.json cannot express here; nothing was added")
    description, ids = json.loads(backend.to_str()), {term: i for i, term in enumerate(wanted, old.vocab_size)}
    keep_text_around(base, description, wanted)
    description["model"]["vocab"] |= ids
    as_spelt = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    as_spelt["normalized"] = description["normalizer"] is not None
    description["added_tokens"] += [{"id": i, "content": term, **as_spelt, "special": term in control}
                                    for term, i in ids.items()]
    write_text(Path(folder, "tokenizer.json"), json.dumps(description, ensure_ascii=False))
    write_settings(base, Path(folder), "PreTrainedTokenizerFast", **roles)
    new = load(folder)
    for term, i in ids.items():
        if new.backend.normalizer and (read := new.backend.normalizer.normalize_str(term)) not in (
                term, term.replace(" ", "▁")):
            raise UserError(f"this tokenizer reads the term {term!r} as {read.replace('▁', ' ')!r}; spell it so, "
                            f"without blanks around it")
        for text in (term, f"a{term}b", f"the {term} is"):
            if new.encode(text).count(i) != 1:
                raise UserError(f"{term!r} is not one token in {text!r}: another token takes a part of it first")
            if (read := new.decode(new.encode(text))) not in (text, old.decode(old.encode(text))):
                raise UserError(f"with {term!r} as a token, {text!r} would come back as {read!r}: this tokenizer "
                                f"changes the text around its added tokens")
    return {i: old.encode(term) for term, i in ids.items()}


# ---- rows of the embedding and the head for new ids; V vocabulary, D model width

@torch.no_grad()
def resize(model, old: Tokenizer, vocab_size: int, parts: dict[int, list[int]], new_rows: NewRows,
           zero_id: int | None = None, spread_ids: frozenset[int] = frozenset()) -> None:
    """Grow the embedding and the head, [V, D] each (one parameter if they are tied), to `vocab_size` rows, in place.
    old: the base's tokenizer. Rows of its ids keep their bits; rows that a base has beyond them count as free.
    parts: {new id: the old ids it stands for}. zero_id: an id whose row is zero whatever new_rows.init says.
    spread_ids: those whose rows are drawn around what new_rows.init says, as control tokens are no text of their parts:
    <extra_id_12> and <extra_id_21> have the same, and rows that were equal would train alike and could not be told
    apart."""
    config = model.config
    if config.vocab_size < old.vocab_size:
        raise UserError(f"the model has {config.vocab_size} rows, but its tokenizer {old.vocab_size} ids; the two "
                        f"belong to different models")
    known = [i for i, token in enumerate(old.tokens) if token is not None]
    generator, apart = (torch.Generator().manual_seed(new_rows.seed) for _ in range(2))
    for module in [model.embed_tokens] if config.tie_word_embeddings else [model.embed_tokens, model.head]:
        weight = module.weight                                          # [V, D]
        make_row = _choose_row_rule(weight[known].float().cpu(), new_rows.init, config.initializer_range, generator)
        deviation = SPREAD * weight[known].float().std(0).cpu()         # [D]
        grown = weight.new_zeros(max(vocab_size, len(weight)), weight.shape[1])
        grown[:len(weight)] = weight
        for i, old_ids in parts.items():
            if i != zero_id:
                row = make_row(weight[list(old_ids)].float().mean(0).cpu())
                if i in spread_ids and new_rows.init in ("subtoken", "subtoken_norm", "mean"):
                    row = row + deviation * torch.randn(len(row), generator=apart)
                grown[i] = row.to(weight)
        module.weight = torch.nn.Parameter(grown)
    config.vocab_size = len(grown)
    model.tie()


def _choose_row_rule(rows: torch.Tensor, init: str, spread: float, generator: torch.Generator):
    """A rule: mean of parts' rows [D] -> new row [D], fp32. rows: the old [V, D]. spread: deviation of random ones."""
    mean, width = rows.mean(0), rows.shape[1]
    if init == "subtoken_norm":
        # A mean has a smaller norm than its rows, but in the head a row of full norm predicts its token too confidently
        # at first: stories260K with 200 new tokens has 6.0 bits per byte on legal text, and 4.0 with "subtoken".
        norm = rows.norm(dim=1).median()
        return lambda part_mean: part_mean * norm / part_mean.norm().clamp(min=1e-12)
    if init == "covariance":
        # Hewitt 2021, "Initializing new word embeddings"
        centred = rows - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows) * 1e-5)
        root = vectors * values.clamp(min=0).sqrt()                     # root @ root.T is the covariance
        return lambda _: mean + root @ torch.randn(width, generator=generator)
    return {"subtoken": lambda part_mean: part_mean, "mean": lambda _: mean, "zero": lambda _: torch.zeros_like(mean),
            "random": lambda _: torch.randn(width, generator=generator) * spread}[init]


def measure_lengths(base: BaseTokenizer, new: Tokenizer, texts: list[str]) -> dict:
    """Lengths of `texts` under both tokenizers, and how often each new id occurs ("counts", int64 [new ids])."""
    first, old_ids, ids = base.tokenizer.vocab_size, base.tokenizer.encode_batch(texts), new.encode_batch(texts)
    before, after = sum(map(len, old_ids)), sum(map(len, ids))
    if not before:
        raise UserError("a text to report on is empty")
    in_bytes = np.isin(np.concatenate(old_ids), [*base.byte_ids.values()]).mean()
    size, words = count_text(texts)
    counts = np.bincount(np.concatenate(ids), minlength=new.vocab_size)[first:]
    return {"documents": len(texts), "bytes": size, "words": words, "tokens_before": before, "tokens_after": after,
            "tokens_per_byte_before": before / size, "tokens_per_word_before": before / max(1, words),
            "tokens_per_byte_after": after / size, "tokens_per_word_after": after / max(1, words),
            "lost_share_before": measure_loss(base.tokenizer, texts[:64]),
            "lost_share_after": measure_loss(new, texts[:64]),
            "change": after / before - 1,
            "largest_possible_change": min(1.0, count_fewest_tokens(base, texts) / before) - 1,
            "spelt_in_bytes": float(in_bytes),
            "documents_touched": sum(bool((i >= first).any()) for i in ids) / len(texts),
            "new_tokens_used": float((counts > 0).mean()) if len(counts) else 0.0, "counts": counts}


def report(base: BaseTokenizer, new: Tokenizer, texts: dict[str, list[str]], corpus_tokens: int) -> dict:
    """Lengths before and after for each of `texts` (one is "domain"), and whether to extend, with the reason.
    corpus_tokens: tokens (of the base) that there are to train on. break_even_tokens: those domain tokens (of the base)
    in which the median new token occurs TIMES_SEEN times; tokens_seen_enough: how many new tokens do so in
    corpus_tokens. spelt_in_bytes: the share of the base's tokens that stand for one byte. largest_possible_change: if
    every word that the tokenizer's own pattern cuts (in SentencePiece: every run of letters of one script, or of
    punctuation) were one token."""
    rows = {name: measure_lengths(base, new, documents) for name, documents in texts.items()}
    domain, counts = rows["domain"], {name: row.pop("counts") for name, row in rows.items()}["domain"]
    rate = float(np.median(counts)) / domain["tokens_before"] if len(counts) else 0.0
    break_even = round(TIMES_SEEN / rate) if rate else None
    shorter, bound, cost = -domain["change"], -domain["largest_possible_change"], (1 + domain["change"]) ** 2
    enough = int((counts * corpus_tokens >= TIMES_SEEN * domain["tokens_before"]).sum())
    advice, why, in_bytes = "keep", f"domain text gets {shorter:.1%} shorter", domain["spelt_in_bytes"]
    if shorter < WORTH_IT:
        why += f", and below {WORTH_IT:.0%} a new vocabulary is not worth its cost"
        if bound < WORTH_IT:
            why += f"; no extension could reach it: with every word one token it would be {bound:.1%}"
    elif break_even is None or corpus_tokens < break_even:
        seldom = f"half of the new rows would be seen less than {TIMES_SEEN} times in {corpus_tokens:,} tokens"
        seldom += f", and that takes {break_even:,}" if break_even else ""
        fewer = f"; {enough:,} are seen more often: ask for about so many with --new-tokens" if enough else ""
        if in_bytes >= IN_BYTES:
            advice = "extend"
            why += f", and the base has hardly trained the single bytes that {in_bytes:.0%} of its tokens are; but "
        else:
            why += ", but "
        why += seldom + fewer
    else:
        advice = "extend"
        why += (f" (attention's cost {1 - cost:.0%} lower), and {corpus_tokens:,} tokens are enough to train the new "
                f"rows ({break_even:,})")
    return {"new_tokens": new.vocab_size - base.tokenizer.vocab_size, "recommendation": advice, "reason": why,
            "break_even_tokens": break_even, "tokens_seen_enough": enough, "corpus_tokens": corpus_tokens,
            "attention_cost": cost, "texts": rows}


def report_command(options: Report) -> dict:
    base, wanted = BaseTokenizer(options.tokenizer), options.learning
    files = {"domain": options.domain, "general": options.general, "code": options.code}
    found = {key: read_documents(some, options.reading) for key, some in files.items() if some or key == "domain"}
    texts = {key: list(documents) for key, documents in found.items()}
    corpus_tokens = options.corpus_tokens or sum(map(len, base.tokenizer.encode_batch(texts["domain"])))
    if options.extended:
        new = load(options.extended)
        if not keeps_ids(base.tokenizer, new):
            raise UserError(f"{options.extended} is no extension of {options.tokenizer}: their old ids differ")
    else:
        learn, texts["domain"] = hold_out(texts["domain"])
        with tempfile.TemporaryDirectory() as folder:
            extend(options.tokenizer, learn, wanted.new_tokens, folder, wanted.min_count)
            new = load(folder)
    result = report(base, new, texts, corpus_tokens)
    print("; ".join(f"{key}: {documents.describe()}" for key, documents in found.items()))
    print(f"{'text':8} {'bytes':>12} {'tokens':>11} {'extended':>11} {'change':>7} {'possible':>8} {'per byte':>15} "
          f"{'per word':>13} {'touched':>8}")
    for name, row in result["texts"].items():
        print("{:8} {bytes:12,} {tokens_before:11,} {tokens_after:11,} {change:7.1%} {largest_possible_change:8.1%} "
              "{tokens_per_byte_before:.4f} > {tokens_per_byte_after:.4f} {tokens_per_word_before:.2f} > "
              "{tokens_per_word_after:.2f} {documents_touched:8.1%}".format(name, **row))
        if row["lost_share_before"] or row["lost_share_after"]:
            print(f"{name}: {row['lost_share_before']:.2%} of its bytes are in no token, and "
                  f"{row['lost_share_after']:.2%} extended")
    used, even = result["texts"]["domain"]["new_tokens_used"], result["break_even_tokens"]
    print(f"{result['new_tokens']} new tokens, {used:.0%} of them in this domain text; break-even at "
          f"{'no size' if even is None else f'{even:,} tokens'}")
    print(f"{result['recommendation']}: {result['reason']}")
    return result

"""How far a domain is from what a base knows, and what to do about it.

`measure` counts a sample of each source (text/sample.py) and scores some of it under the base; `recommend` turns the
figures into an answer with its reasons, by the rules below, the first that holds:

    knowledge must be fresher than 24 hours               retrieval: a training is older than that when it ends
    ratio below 1.3 and overlap above 0.9                  skip: the base reads the domain as it reads general text
    another language than the general text's               pretrain: nothing else teaches one, and only with its volume
    overlap below 0.7                                      pretrain
    ratio above 2                                          pretrain above a billion tokens, else SFT
    accuracy gap above 0.2                                 SFT above 100M tokens, else retrieval
    else                                                   prompt

    and where that says pretrain, but not of another language: skip it below 100M tokens or 100 GPU-hours (use adapters)

overlap = |domain types ∩ general types| / |domain types| over the base's tokens, divided by the same of two samples of
the general text: two samples of one text share few of a large vocabulary's types. ratio = perplexity of the base on the
domain / on general text. Volume comes after overlap and ratio, because how much text is enough depends on what is to be
learned: a language takes 5 to 20 billion tokens, terminology 1 to 5. What copies repeat does not count as volume.
"""

import collections
import math
import re
import tempfile

import numpy as np

from core.errors import UserError
from core.output import escape
from learn.objectives import Causal
from learn.schedules import recommended
from measure.scoring import score
from text import duplicates, vocabulary
from text.corpus import utf8
from text.extend_vocabulary import BaseTokenizer, Learning, extend, report
from text.sample import Sample
from text.scores import identify_language
from text.train_vocabulary import count_text, hold_out

# The limits of the rules, from SPEC.md's guides.
OVERLAP, RATIO, ACCURACY, SMALL_RATIO, SMALL_OVERLAP = 0.7, 2.0, 0.2, 1.3, 0.9
MANY_TOKENS, LEAST_TOKENS, LEAST_GPU_HOURS, LEAST_AGE_HOURS = 1e9, 1e8, 100.0, 24.0
# Replay for a weak and a strong shift: arXiv 2403.08763 has 5 % for English to English, 25 % for English to German.
WEAK_REPLAY, STRONG_REPLAY = 0.05, 0.25
USUAL = {"another language": "5 to 20 billion", "a strong shift": "1 to 10 billion", "a weak shift": "1 to 5 billion"}
# Tokens of a document that are scored; the least bytes of one that may count as worst; bytes that teach an extension.
SCORED, WORST_BYTES, TAUGHT_BYTES = 512, 100, 1 << 21


# ---- one source

def measure_source(sample: Sample, tokenizer, byte_ids: np.ndarray) -> tuple[dict, np.ndarray]:
    """(figures of a source's text under a tokenizer, the ids of its sample). Shares are of tokens or documents."""
    texts = sample.texts
    ids = np.concatenate([np.zeros(0, np.int64), *tokenizer.encode_batch(texts)])
    if not len(ids):
        raise UserError("its text has no tokens")
    size, words = count_text(texts)
    exact, near = find_copies(texts)
    volume = len(ids) if sample.counted else None if sample.corpus_bytes is None else round(
        sample.corpus_bytes * len(ids) / size)
    return {"files": sample.files, "documents": len(texts), "empty_documents": sample.empty,
            "bytes": sample.corpus_bytes, "tokens": volume, "counted": sample.counted,
            "sample_bytes": size, "sample_tokens": len(ids),
            "tokens_per_byte": len(ids) / size, "tokens_per_word": len(ids) / max(1, words),
            "spelt_in_bytes": float(np.isin(ids, byte_ids).mean()),
            "unknown": float((ids == tokenizer.unk_id).mean()) if tokenizer.unk_id is not None else 0.0,
            "lost_share": vocabulary.measure_loss(tokenizer, texts[:64]), "language": find_language(texts),
            "exact_copies": exact, "near_copies": near}, ids


def find_byte_ids(tokenizer) -> np.ndarray:
    """The ids that stand for one byte of a character for which the vocabulary has no token of its own."""
    is_bytewise = vocabulary.LETTER_BYTES.keys() <= tokenizer.vocab.keys()
    return np.array([i for i, token in enumerate(tokenizer.tokens) if token and (
        re.fullmatch("<0x[0-9A-F]{2}>", token)
        or (is_bytewise and len(token) == 1 and vocabulary.LETTER_BYTES.get(token, 0) >= 0x80))], np.int64)


def find_copies(texts: list[str]) -> tuple[float, float]:
    """The shares of the documents that are copies of another one: word for word, and nearly (of their five-word
    shingles 0.8 are shared), as dedup.py finds them."""
    folded = [duplicates.fold_words(text) for text in texts]
    first = list(dict.fromkeys(folded))
    sets = [np.unique(grams) for grams in duplicates.hash_ngrams(first, duplicates.SHINGLE)]
    keys = duplicates.compute_band_keys(sets)
    bands = [duplicates.link_band(keys[:, band]) for band in range(duplicates.BANDS)]
    stays, _, _ = duplicates.keep_best(bands, len(first), sets.__getitem__, 0.8)
    near = int((stays != np.arange(len(first))).sum())
    return 1 - len(first) / len(texts), near / len(texts)


def find_language(texts: list[str]) -> str:
    """The language of most of the text, by script and stop words; "unknown" where it is no known one, or code."""
    bytes_of = collections.Counter()
    for text in texts[:: max(1, len(texts) // 200)]:
        words = collections.Counter(re.findall(r"\w+", text[:4000].lower()))
        bytes_of[identify_language(text[:4000], words, False)[0]] += len(text[:4000])
    return max(bytes_of, key=bytes_of.get)


def score_source(model, tokenizer, texts: list[str], tokens: int, seed: int) -> dict:
    """bits_per_byte, perplexity and nats_per_token of the base on the beginnings of documents drawn at random, about
    `tokens` tokens of them, and the "worst", those with the most bits per byte."""
    T = min(SCORED, model.config.max_position_embeddings)
    documents, shown, left = [], [], tokens
    for i in np.random.default_rng(seed).permutation(len(texts)).tolist():
        ids = tokenizer.encode(texts[i][:8 * T])[:T]
        read = tokenizer.decode(ids).rstrip("\ufffd")
        if len(ids) and read:
            documents.append((np.array(ids, np.int64), len(utf8(read))))
            shown.append(read)
            left -= len(ids)
        if left <= 0:
            break
    found = score(model, Causal(True), documents, vocabulary.token_before_document(tokenizer), T)
    bits = np.array(found.pop("nats_by_document")) / math.log(2) / np.array([size for _, size in documents])
    order = [i for i in (-bits).argsort(kind="stable").tolist() if documents[i][1] >= WORST_BYTES][:3]
    kept = {key: found[key] for key in ("nats_per_token", "perplexity", "bits_per_byte")}
    worst = [{"bits_per_byte": float(bits[i]), "text": shown[i][:300]} for i in order]
    return {**kept, "scored_tokens": found["tokens"], "scored_documents": len(documents), "worst": worst}


# ---- both sides

def measure_overlap(domain: np.ndarray, general: np.ndarray) -> float:
    """|domain types ∩ general types| / |domain types|."""
    types = np.unique(domain)
    return float(np.isin(types, general).mean())


def take(parts: list[np.ndarray], size: int) -> np.ndarray:
    """About `size` tokens: the beginning of each part, in proportion to its length."""
    total = sum(map(len, parts))
    return np.concatenate([ids[:-(-len(ids) * size // total)] for ids in parts])


def measure_divergence(a: list[str], b: list[str], n: int) -> float:
    """The Jensen-Shannon divergence, 0 to 1 bit, of the n-grams of words in two lists of texts."""
    sides = [np.unique(np.concatenate([np.zeros(0, np.uint64), *duplicates.hash_ngrams(
        list(map(duplicates.fold_words, texts)), n)]), return_counts=True) for texts in (a, b)]
    values = np.union1d(sides[0][0], sides[1][0])
    p, q = (np.zeros(len(values)) for _ in sides)
    for share, (own, counts) in zip((p, q), sides):
        share[values.searchsorted(own)] = counts / max(1, counts.sum())

    def entropy(share):
        share = share[share > 0]
        return -(share * np.log2(share)).sum()
    return float(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)


def combine(sources: dict[str, dict]) -> dict:
    """The figures of a side, its sources weighed by their volume."""
    def mean(key, by):
        weight = [found[by] for found in sources.values()]
        if None in weight:
            weight = [found[f"sample_{by}"] for found in sources.values()]
        return sum(found[key] * n for found, n in zip(sources.values(), weight)) / sum(weight)
    volumes = [found["tokens"] for found in sources.values()]
    nats, copies = mean("nats_per_token", "tokens"), mean("exact_copies", "tokens") + mean("near_copies", "tokens")
    return {"tokens": None if None in volumes else sum(volumes), "counted": all(f["counted"] for f in sources.values()),
            "perplexity": math.exp(min(nats, 700)), "bits_per_byte": mean("bits_per_byte", "bytes"), "copies": copies,
            "tokens_per_byte": mean("tokens_per_byte", "bytes"), "tokens_per_word": mean("tokens_per_word", "bytes"),
            "spelt_in_bytes": mean("spelt_in_bytes", "tokens"), "unknown": mean("unknown", "tokens"),
            "language": max(sources.values(), key=lambda found: found["tokens"] or 0)["language"]}


def measure(model, tokenizer, domain: dict[str, Sample], general: dict[str, Sample], tokens: int, seed: int,
            declared: float | None = None) -> dict:
    """All figures: {"domain", "general": of each side, "sources", "vocabulary_overlap", "perplexity_ratio", ...}.

    tokens: how many of each side are scored. declared: the tokens that the domain has, where the files are a part."""
    byte_ids, sources, ids, sides = find_byte_ids(tokenizer), {}, {}, {}
    for side, samples in (("domain", domain), ("general", general)):
        own = {}
        for name, sample in samples.items():
            try:
                if not sample.texts:
                    raise UserError("it has no text")
                own[name], counted = measure_source(sample, tokenizer, byte_ids)
            except UserError as error:
                raise UserError(f"--{side} {name}: {error}") from None
            own[name] |= score_source(model, tokenizer, sample.texts, tokens // len(samples), seed) | {"side": side}
            ids.setdefault(side, []).append(counted)
        sides[side], sources = combine(own), sources | own
    texts = {side: [text for sample in samples.values() for text in sample.texts]
             for side, samples in (("domain", domain), ("general", general))}
    if declared:
        sides["domain"] |= {"tokens": round(declared), "counted": False}
    own, others = texts["domain"], texts["general"]
    # A sample shares few of a large vocabulary's types even with another sample of the same text. So the overlap is
    # judged by that of general text with itself, in samples of one size: a half of each general source with the other.
    first, half = [each[:max(1, len(each) // 2)] for each in ids["general"]], np.concatenate(
        [each[len(each) // 2:] for each in ids["general"]])
    whole = {side: np.concatenate(parts) for side, parts in ids.items()}
    size = min(len(whole["domain"]), sum(map(len, first)))
    itself, compared = (measure_overlap(take(parts, size), half) for parts in (first, ids["domain"]))
    languages = sides["domain"]["language"], sides["general"]["language"]
    return {**sides, "sources": sources,
            "vocabulary_overlap": measure_overlap(whole["domain"], whole["general"]),
            "overlap_within_general": itself, "relative_overlap": min(1.0, compared / itself) if itself else 0.0,
            "perplexity_ratio": sides["domain"]["perplexity"] / sides["general"]["perplexity"],
            "bits_per_byte_ratio": sides["domain"]["bits_per_byte"] / sides["general"]["bits_per_byte"],
            "divergence": {"words": measure_divergence(own, others, 1),
                           "word_pairs": measure_divergence(own, others, 2),
                           "words_within_general": measure_divergence(others[::2], others[1::2], 1)},
            "new_language": "unknown" not in languages and languages[0] != languages[1]}


def judge_extension(path, domain: list[str], general: list[str], corpus_tokens: int) -> dict:
    """Whether to extend the base's vocabulary, by tokenizer.py's own report on an extension learned from the sample."""
    def cut(texts):
        ends = np.cumsum([len(text) for text in texts])
        return texts[:max(20, int(ends.searchsorted(TAUGHT_BYTES)))]
    try:
        base = BaseTokenizer(path)
        learn, held_out = hold_out(cut(domain))
        with tempfile.TemporaryDirectory() as folder:
            extend(path, learn, Learning().new_tokens, folder, Learning().min_count)
            found = report(base, vocabulary.load(folder), {"domain": held_out, "general": cut(general)}, corpus_tokens)
    except UserError as error:
        return {"recommendation": "keep", "reason": str(error), "new_tokens": 0}
    return {key: found[key] for key in ("recommendation", "reason", "new_tokens", "break_even_tokens")} | {
        "change": found["texts"]["domain"]["change"]}


# ---- the answer

def name_shift(figures: dict) -> str:
    strong = figures["relative_overlap"] < OVERLAP or figures["perplexity_ratio"] > RATIO
    return "another language" if figures["new_language"] else "a strong shift" if strong else "a weak shift"


def recommend(figures: dict, fresh_hours: float | None = None, gpu_hours: float | None = None,
              accuracy_gap: float | None = None) -> dict:
    """{"recommendation": pretrain, sft, retrieval, prompt or skip, "instead": what to do where it is skip, "reasons"}.

    fresh_hours: how old knowledge may be. gpu_hours: what can be spent. accuracy_gap: on tasks, general less domain."""
    overlap, ratio = figures["relative_overlap"], figures["perplexity_ratio"]
    many, least = describe_tokens(MANY_TOKENS), describe_tokens(LEAST_TOKENS)
    tokens, copies = figures["domain"]["tokens"] or 0, figures["domain"]["copies"]
    distinct, shift = tokens * (1 - copies), name_shift(figures)
    volume = f"{describe_tokens(distinct)} tokens" + (f" (of {describe_tokens(tokens)}, less copies)" if copies > 0.01
                                                      else "")
    if fresh_hours is not None and fresh_hours < LEAST_AGE_HOURS:
        return answer("retrieval", f"knowledge must be fresher than {LEAST_AGE_HOURS:g} hours, and no training is: "
                                   f"look it up when it is asked for")
    if ratio < SMALL_RATIO and overlap > SMALL_OVERLAP:
        return answer("skip", f"small gap: perplexity is {ratio:.2f} times that on general text (below {SMALL_RATIO}) "
                              f"and vocabulary overlap {overlap:.2f} (above {SMALL_OVERLAP}), so the base reads this "
                              f"text already; prompt it, with retrieval for facts", instead="prompt")
    reasons = []
    if shift == "another language":
        languages = figures["domain"]["language"], figures["general"]["language"]
        reasons = [f"the domain is in another language ({languages[0]}) than the general text ({languages[1]}), with "
                   f"vocabulary overlap {overlap:.2f}: only continued pretraining teaches a language"]
        if distinct < LEAST_TOKENS:
            reasons.append(f"but not with {volume}: a language takes {USUAL[shift]}; until there are more than "
                           f"{least} collect text, or begin with a base that knows the language")
        if gpu_hours is not None and gpu_hours < LEAST_GPU_HOURS:
            reasons.append(f"but not in {gpu_hours:g} GPU-hours, which are fewer than {LEAST_GPU_HOURS:g}: begin with "
                           f"a base that knows the language")
        return answer("pretrain", *reasons)
    if overlap < OVERLAP:
        reasons = [f"vocabulary overlap, {overlap:.2f} of general text's with itself, is below {OVERLAP}: the domain "
                   f"is written in tokens that general text lacks"]
    elif ratio > RATIO:
        reasons = [f"perplexity on the domain is {ratio:.3g} times that on general text (above {RATIO:g})"]
        if distinct <= MANY_TOKENS:
            reasons[0] += (f", but {volume} are at most {many}: too few to pretrain on; fine-tune on "
                           f"instructions made from the text")
            if distinct < LEAST_TOKENS:
                reasons.append(f"below {least} tokens adapters (LoRA) are enough, and single facts are "
                               f"better looked up (retrieval)")
            return answer("sft", *reasons)
        reasons[0] += f", and {volume} are more than {many}"
    elif accuracy_gap is not None and accuracy_gap > ACCURACY:
        few = distinct <= LEAST_TOKENS
        return answer("retrieval" if few else "sft", f"tasks of the domain score {accuracy_gap:.2f} lower (above "
                      f"{ACCURACY}), with {volume}, {'at most' if few else 'more than'} {least}")
    else:
        return answer("prompt", f"the base reads the domain well enough: perplexity {ratio:.2f} times that on general "
                                f"text (at most {RATIO:g}), vocabulary overlap {overlap:.2f} (at least {OVERLAP})")
    if distinct < LEAST_TOKENS:
        return answer("skip", *reasons, f"but {volume} are fewer than {least}: full continued pretraining "
                      f"would learn them by heart; train adapters (LoRA) with replay, and leave facts to retrieval",
                      instead="adapters")
    if gpu_hours is not None and gpu_hours < LEAST_GPU_HOURS:
        return answer("skip", *reasons, f"but {gpu_hours:g} GPU-hours are fewer than {LEAST_GPU_HOURS:g}: use adapters "
                      f"(LoRA)", instead="adapters")
    return answer("pretrain", *reasons, f"{volume}; usual for {shift}: {USUAL[shift]}")


def answer(recommendation: str, *reasons: str, instead: str | None = None) -> dict:
    return {"recommendation": recommendation, "instead": instead, "reasons": list(reasons)}


def choose_settings(figures: dict, found: dict, parameters: int) -> dict:
    """What the training should have, if there is one: its method, learning rate and replay share."""
    shift = name_shift(figures)
    method = "lora" if found["instead"] == "adapters" or found["recommendation"] == "sft" else "full"
    lr, min_lr = recommended(parameters, method)
    return {"shift": shift, "method": method, "lr": lr, "min_lr": min_lr,
            "replay": WEAK_REPLAY if shift == "a weak shift" else STRONG_REPLAY}


def list_warnings(figures: dict, is_chat: bool) -> list[str]:
    """What a user should know beside the answer."""
    domain, general, warnings = figures["domain"], figures["general"], []
    if is_chat:
        warnings.append("the base carries a chat template: it is tuned to follow instructions, and continuing its "
                        "pretraining on plain text costs it that (arXiv 2410.10739: about 10 points of IFEval after a "
                        "billion tokens). Begin with the base model that it was made from and put the tuning back "
                        "afterwards (forget.py graft, or merge), or mix conversations in (data.sources.NAME.format "
                        "chat)")
    if domain["copies"] > 0.1:
        more = "" if domain["counted"] else ": a sample finds few of them, and there may be far less text than it seems"
        warnings.append(f"{domain['copies']:.0%} of the domain's sampled documents are copies, which are learned by "
                        f"heart; run dedup.py first{more}")
    for side in ("domain", "general"):
        if figures[side]["unknown"] > 0.001:
            warnings.append(f"{figures[side]['unknown']:.1%} of the {side}'s tokens are the unknown token: the base "
                            f"cannot read that text as it is")
        if figures[side]["tokens"] is None:
            warnings.append(f"nothing says how large the {side} text is (a Hub dataset)"
                            + ("; give --domain-tokens" if side == "domain" else ""))
    if general["perplexity"] > domain["perplexity"]:
        warnings.append("the base reads the domain better than the general text; is that text of the kind that the "
                        "base was trained on?")
    return warnings


def describe_tokens(n: float) -> str:
    """1234 -> 1,234; 12345678 -> 12.3M; 5e9 -> 5B."""
    for size, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if n >= size:
            return f"{n / size:.3g}{sign}"
    return f"{n:,.0f}"


# ---- words for a terminal

def describe(result: dict) -> str:
    """The figures as a table, the answer and its reasons."""
    sources = result["sources"]
    lines = [f"{'source':16} {'side':8} {'tokens':>9} {'per byte':>9} {'per word':>9} {'in bytes':>9} {'copies':>7} "
             f"{'bits/byte':>9} {'perplexity':>10} {'scored':>8}"]
    for name, row in sources.items():
        volume = "?" if row["tokens"] is None else f"{'' if row['counted'] else '~'}{describe_tokens(row['tokens'])}"
        lines.append(f"{escape(name, line=True)[:16]:16} {row['side']:8} {volume:>9} {row['tokens_per_byte']:9.3f} "
                     f"{row['tokens_per_word']:9.2f} {row['spelt_in_bytes']:9.1%} "
                     f"{row['exact_copies'] + row['near_copies']:7.1%} {row['bits_per_byte']:9.3f} "
                     f"{row['perplexity']:10{'.2f' if row['perplexity'] < 1e6 else '.1e'}} "
                     f"{describe_tokens(row['scored_tokens']):>8}")
    split = result["divergence"]
    lines += ["",
              f"vocabulary overlap {result['vocabulary_overlap']:.3f}; in samples of one size "
              f"{result['relative_overlap']:.3f} of what general text has with itself "
              f"({result['overlap_within_general']:.3f}), by which it is judged",
              f"perplexity {result['perplexity_ratio']:.3g} times that on general text, bits per byte "
              f"{result['bits_per_byte_ratio']:.2f} times",
              f"divergence of words {split['words']:.2f} bits of 1, of pairs of words {split['word_pairs']:.2f} (two "
              f"halves of the general text: {split['words_within_general']:.2f})"]
    for name, row in sources.items():
        if row["side"] == "domain":
            for worst in row["worst"]:
                text = escape(" ".join(worst["text"].split()), line=True)
                lines.append(f"hardest of {name}: {worst['bits_per_byte']:.2f} bits per byte: {text[:90]}")
    use = result["settings"]
    lines += ["", f"recommendation: {result['recommendation']}"
                  + (f" (instead: {result['instead']})" if result["instead"] else "")]
    lines += [f"  because {reason}" for reason in result["reasons"]]
    lines += [f"if you train: {use['method']}, learning rate {use['lr']:g} down to {use['min_lr']:g}, replay "
              f"{use['replay']:.0%} ({use['shift']})",
              f"vocabulary: {result['extension']['recommendation']}: {result['extension']['reason']}"]
    return "\n".join(lines + [f"warning: {warning}" for warning in result["warnings"]])

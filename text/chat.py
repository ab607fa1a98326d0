"""Conversations -> token ids, and which of them are learned: the assistant's answers, or all.

A conversation is written as text in segments that are encoded one by one, so that no token stands on both sides of a
border between what is learned and what is not. Control tokens that belong to the form, such as <|im_end|>, become their
ids; where a user wrote the same letters, they stay plain text. Nothing is left out because of its id: the token that
ends an answer is learned, also where it is the padding token or EOS.
"""

import collections
import contextlib
import functools
import itertools
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from core.errors import UserError
from text import shards
from text.conversations import Conversation, read_conversations
from text.corpus import utf8
from text.heldout import is_held_out, normalise
from text.sandbox import MARK
from text.template import ChatTemplate, TemplateProcess
from text.vocabulary import ROLES, measure_loss


class Segment(NamedTuple):
    text: str
    learned: bool


@dataclass
class Example:
    """What is held out or trained on together: one conversation, or the two of a preference, chosen before rejected."""

    # The text whose hash holds it out: of a preference its prompt, so that all answers to it stand on one side.
    key: str
    documents: list[list[Segment]]

    def __len__(self):
        return sum(len(segment.text) for document in self.documents for segment in document)


class Renderer(contextlib.AbstractContextManager):
    """render(conversations) -> Example, as the tokenizer's chat template writes them; without one in Alpaca's form,
    between BOS (where the model was trained with one) and EOS.

    learn: "responses" or "all"; of a preference only its last answer is learned. Where no control token ends an answer
    that ends its conversation, EOS does.
    """

    def __init__(self, tokenizer, template: ChatTemplate | None, learn: str):
        self.learn_all, self.special = learn == "all", control_tokens(tokenizer)
        self.controls = control_tokens(tokenizer, template)
        roles = {f"{role}_token": tokenizer.tokens[i] for role in ROLES
                 if (i := getattr(tokenizer, f"{role}_id")) is not None}
        self.first, self.last = roles["bos_token"] if tokenizer.add_bos else "", roles["eos_token"]
        ends = [token for token in self.controls if token == self.last or token != roles.get("bos_token")]
        self.ended = re.compile(rf"({find_any(ends).pattern})\s*$")
        self.process = TemplateProcess(template, roles, ends) if template else None

    def __exit__(self, *error):
        if self.process:
            self.process.__exit__(*error)

    def render(self, conversations: list[Conversation]) -> Example:
        write = self._write if self.process else self._write_plain
        documents = [write(conversation, len(conversations) > 1) for conversation in conversations]
        return Example(conversations[0].key(last=len(conversations) == 1), documents)

    def _write_plain(self, conversation: Conversation, last_only: bool) -> list[Segment]:
        prompt, answer = (mark_controls(text, self.controls) for text in conversation.write_alpaca())
        return [Segment(self.first + prompt, self.learn_all), Segment(answer + self.last, True)]

    def _write(self, conversation: Conversation, last_only: bool) -> list[Segment]:
        where, messages, tools = conversation
        # The assistant may write whatever is not a special token of the model's, such as <think>.
        marked = [{**mark_all(message, self.special if message["role"] == "assistant" else self.controls),
                   "role": message["role"]} for message in messages]
        text, spans = self.process.write(where, marked, mark_all(tools, self.controls))
        spans = spans[-1:] if last_only else spans
        if not any(begin < end for begin, end in spans):
            raise UserError(f"{where} has nothing to learn: the chat template in {self.process.template.file} writes "
                            f"none of its answers")
        if messages[-1]["role"] == "assistant" and not text[spans[-1][1]:].strip() and not self.ended.search(text):
            # The answer goes on to the end of what the template writes.
            spans = [*spans[:-1], (spans[-1][0], len(text) + len(self.last))]
            text += self.last
        if self.learn_all:
            return [Segment(text, True)]
        borders = [0, *itertools.chain(*spans), len(text)]
        return [Segment(text[begin:end], i % 2 == 1) for i, (begin, end) in enumerate(itertools.pairwise(borders))
                if begin < end]


# ---- control tokens

def control_tokens(tokenizer, template: ChatTemplate | None = None) -> dict[str, int]:
    """{text: id} of the tokens that belong to a form and not to a text: the special ones, such as BOS and EOS, and of
    the others that were added to a vocabulary those that the template writes."""
    added = getattr(tokenizer.backend, "get_added_tokens_decoder", dict)().items()
    # Blanks, which some vocabularies have as added tokens, stand in each template.
    written = {i for i, token in added if template and token.content.strip() and token.content in template.source}
    return {token: i for i in sorted({*tokenizer.special_ids, *written}) if (token := tokenizer.tokens[i])}


def find_any(tokens) -> re.Pattern:
    """A pattern that finds each of these tokens, the longest that begins at a place, and keeps it in a split."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def mark_controls(text: str, tokens) -> str:
    """`text` with a MARK behind the first letter of each of these tokens in it, as often as there is one."""
    text, pattern = text.replace(MARK, ""), find_any(token for token in tokens if len(token) > 1)
    while pattern.search(text):
        text = pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
    return text


def mark_all(value, tokens):
    """`value` with each text in it marked, the names of fields too."""
    if isinstance(value, dict):
        return {mark_all(key, tokens): mark_all(each, tokens) for key, each in value.items()}
    if isinstance(value, list):
        return [mark_all(each, tokens) for each in value]
    return mark_controls(value, tokens) if isinstance(value, str) else value


class SegmentEncoder:
    """encode(segments) -> (ids uint32 [n], learned bool [n], UTF-8 bytes of the learned text without control tokens).

    The package `tokenizers` finds control tokens in a text, the others do not: there the text is cut at them here. What
    follows one begins anew, which for SentencePiece means a blank before it, as in a document of its own. What goes on
    within a text is encoded behind something else, whose ids are then cut off.
    """

    def __init__(self, tokenizer, controls: dict[str, int]):
        self.encode_text = lambda text: tokenizer.encode_batch([text])[0].tolist()
        self.prefix_of = functools.cache(self.encode_text)
        self.controls = controls
        own = [token for token, i in self.controls.items() if self.encode_text(token) != [i]]
        self.own, self.any = find_any(own), find_any(self.controls)
        # Whether a text gets a blank at its beginning that it does not have within another.
        newline = self.encode_text("\n")
        self.adds_prefix = self.encode_text("\na")[len(newline):] != self.encode_text("a")

    def encode(self, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray, int]:
        ids, learned, nbytes, before = [], [], 0, None
        for segment in segments:
            start = len(ids)
            for run in segment.text.split(MARK):
                for part in filter(None, self.own.split(run)):
                    ids += self._encode_part(part, before)
                    before = next((token for token in self.any.findall(part)[-1:] if part.endswith(token)), "")
            learned += [segment.learned] * (len(ids) - start)
            nbytes += len(utf8(self.any.sub("", segment.text).replace(MARK, ""))) if segment.learned else 0
        return np.array(ids, np.uint32), np.array(learned, bool), nbytes

    def _encode_part(self, part: str, before: str | None) -> list[int]:
        """The ids of a control token or of a text; before: the control token before it, "" where a text stands there,
        None at the beginning of the document."""
        if self.own.fullmatch(part):
            return [self.controls[part]]
        anew = before is None or (before and self.own.fullmatch(before))
        prefix = "" if anew else before or ("\n" if self.adds_prefix else "")
        ids, skipped = self.encode_text(prefix + part), self.prefix_of(prefix) if prefix else []
        return ids[len(skipped):] if ids[:len(skipped)] == skipped else self.encode_text(part)


# ---- packing

def pack_conversations(files: list[str], tokenizer, template: ChatTemplate | None, out, form: str, *,
                       learn: str = "responses", max_tokens: int | None = None, reading=None,
                       part: tuple[int, int] = (1, 1), bar=None, **options) -> dict:
    """Pack the conversations of files as the template writes them; returns the manifest. form: "chat" or "preference".

    A conversation of more than `max_tokens` tokens is left out, of a preference with its other half. bar: a tqdm, moved
    by each record. `options` are those of shards.write_folders."""
    read = functools.partial(read_conversations, form=form, plain=template is None, reading=reading)
    found = iter(shards.deal_documents(files, read, *part))
    first = list(itertools.islice(found, 64))
    said = [turn["content"] or "" for conversations in first for turn in conversations[0].messages]
    with Renderer(tokenizer, template, learn) as renderer:
        def examples():
            for conversations in itertools.chain(first, found):
                yield renderer.render(conversations)
                if bar is not None:
                    bar.update()
        return shards.pack(examples(), tokenizer, out, lost_share=measure_loss(tokenizer, said),
                           encode=functools.partial(encode_examples, renderer.controls, max_tokens),
                           records=describe(form, learn, template), **options)


def describe(form: str, learn: str, template: ChatTemplate | None) -> dict:
    """What a manifest says of how conversations were written."""
    return {"format": form, "learn": learn, "template": template.fingerprint if template else "alpaca"}


def encode_examples(controls: dict[str, int], max_tokens: int | None, shared, batch: list):
    """In a worker thread, Examples (k, example) -> ({(k, split): (ids [n], tokens of each document, bytes of each,
    which tokens are learned [n])}, the k of each Example with a document of more than `max_tokens`)."""
    tokenizer, _, heldout, heldout_hash = shared
    documents, too_long = collections.defaultdict(lambda: ([], [], [], [])), []
    encoder = SegmentEncoder(tokenizer, controls)
    for k, example in batch:
        encoded = [encoder.encode(document) for document in example.documents]
        if max_tokens and max(len(ids) for ids, *_ in encoded) > max_tokens:
            too_long.append(k)
            continue
        hashed = utf8(normalise(example.key) if heldout_hash == "normal" else example.key)
        place = documents[k, "heldout" if is_held_out(hashed, heldout) else "train"]
        for ids, learned, nbytes in encoded:
            for column, value in zip(place, (ids, len(ids), nbytes, learned)):
                column.append(value)
    return {place: (np.concatenate(ids), np.array(lengths), np.array(nbytes), np.concatenate(learned))
            for place, (ids, lengths, nbytes, learned) in documents.items()}, too_long

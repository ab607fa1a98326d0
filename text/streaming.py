"""Text of ids that arrive one by one, as a model chooses them."""

from core.errors import UserError


class TextStream:
    """The text of a growing list of ids; `write` gets each piece of it as soon as no later token can change it.

    All ids are decoded each time, because SentencePiece drops the space before the first of them. The bytes of an
    unfinished UTF-8 character are held back, and so is an ending that may become one of the `stop` strings: with stop
    "END", of the text "the E" only "the " is written. The text ends before the stop string that is complete first; the
    prompt is not searched for one. After finish(), `text` is what was written.
    """

    def __init__(self, tok, ids, stop=(), write=lambda piece: None):
        if "" in stop:
            raise UserError("a stop string is empty; leave --stop out to stop at the end token alone")
        self.tok, self.ids, self.stop, self.write = tok, list(ids), tuple(stop), write
        self.text, self.stopped = tok.decode(self.ids), False
        self.prompt_length = len(self.text)
        write(self.text)

    def push(self, token: int) -> bool:
        """Add one id; True once a stop string is complete."""
        # An id that the tokenizer does not have is a row that pads the model's embedding, and has no text.
        if token < self.tok.vocab_size:
            self.ids.append(token)
        text = self.tok.decode(self.ids).rstrip("\ufffd")
        held_back = [n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])]
        self._write(text, len(text) - max(held_back, default=0))
        return self.stopped

    def finish(self) -> str:
        """Write what was held back; -> the full text."""
        if not self.stopped:
            self._write(self.tok.decode(self.ids))
        return self.text

    def _write(self, text: str, end: int | None = None):
        """Write what is new in `text`, up to `end` or the first stop string."""
        starts = {s: text.find(s, self.prompt_length) for s in self.stop}
        complete_stops = [(start + len(s), start) for s, start in starts.items() if start >= 0]
        self.stopped = bool(complete_stops)
        piece = text[len(self.text):min(complete_stops)[1] if complete_stops else end]
        self.text += piece
        self.write(piece)

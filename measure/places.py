"""Where a value of a run folder stands: file, line and names, so that a reader of the report can look it up."""

import json
import re
from dataclasses import dataclass, field, replace

# A scalar's text may hold any of these signs, so that strings are tokens too.
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:\n]')


@dataclass(frozen=True)
class Place:
    """A file of the run folder, a line of it (or "5-64"), and the names that lead to a value there."""
    file: str
    line: int | str | None = None
    names: tuple = ()
    # {names: line} of a file whose objects stand on many lines.
    lines: dict = field(default_factory=dict, compare=False, repr=False)

    def at(self, *names) -> "Place":
        return replace(self, names=self.names + names)

    def __str__(self) -> str:
        """'eval.json:12 /after/law/bits_per_byte': the names as a JSON pointer (RFC 6901)."""
        # Names are a stranger's: no line break of theirs ends the place.
        names = [json.dumps(str(name), ensure_ascii=False)[1:-1].replace("~", "~0").replace("/", "~1")
                 for name in self.names]
        line = self.line or next((self.lines[self.names[:n]] for n in range(len(names), 0, -1)
                                  if self.names[:n] in self.lines), None)
        return f"{self.file}{f':{line}' if line else ''}{' /' if names else ''}{'/'.join(names)}"


def place_of(row: dict) -> Place:
    """Where a line of metrics.jsonl stands."""
    return Place("metrics.jsonl", row.get("line"))


def find_lines(text: str) -> dict[tuple, int]:
    """{names: line} of the values of a JSON file that stand in objects alone; those in a list have the list's line."""
    found, line, names, string = {}, 1, [], ""
    for match in JSON_TOKEN.finditer(text):
        token = match[0]
        if token == "\n":
            line += 1
        elif token[0] == '"':
            string = token
        elif token == ":":
            names[-1] = json.loads(string)
            if None not in names:
                found[tuple(names)] = line
        elif token in "{[":
            names.append(None)
        else:
            names.pop()
    return found


def find_toml_lines(text: str) -> dict[tuple, int]:
    """The same of the plain keys of a TOML file as a run writes it: [section] and key = value."""
    found, section = {}, ()
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.fullmatch(r"\[([\w.-]+)\]\s*", line):
            section = tuple(match[1].split("."))
        elif match := re.match(r"([\w-]+) = ", line):
            found[*section, match[1]] = number
    return found

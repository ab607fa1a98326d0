"""The chat template of a model: where it stands, and the process that writes conversations by it (text/sandbox.py),
which fills the prompts of others' task files as well."""

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from core.errors import UserError
from core.foreign_files import own_file, read_own, read_own_json
from text.sandbox import SECONDS
from text.vocabulary import find_file

ROOT = Path(__file__).parent.parent
# Bytes of a template; the longest that are known have 20,000.
MOST_BYTES = 1 << 20
START = "import sys; sys.path.insert(0, sys.argv[1]); from text.sandbox import serve; serve()"


class ChatTemplate(NamedTuple):
    source: str
    # The file that it is from, for messages.
    file: Path

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()


def read_template(tokenizer_path) -> ChatTemplate | None:
    """The chat template beside a tokenizer, as transformers finds it: chat_template.jinja, else chat_template of
    tokenizer_config.json or of chat_template.json, of named ones the default; None where there is none."""
    folder = find_file(tokenizer_path).parent
    if own_file(file := folder / "chat_template.jinja"):
        try:
            return ChatTemplate(read_own(file, MOST_BYTES).decode(), file)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 ({error}); fetch it again") from None
    for file in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        found = read_own_json(file).get("chat_template") if own_file(file) else None
        if isinstance(found, list):
            named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
            if "default" not in named:
                raise UserError(f"{file} has chat templates, but none of the name default (it has: "
                                f"{', '.join(map(str, named))}); put the one to use beside it as chat_template.jinja")
            found = named["default"]
        if found and not isinstance(found, str):
            raise UserError(f"{file} has a chat_template that is no text; fetch it again")
        if found:
            return ChatTemplate(found, file)
    return None


class SandboxProcess(contextlib.AbstractContextManager):
    """ask(what, question) -> the reply of a process that runs templates of a stranger's, made of `made` (see `serve`).

    UserError, with `what` went wrong, for a template that fails, loops, or fills the memory.
    """

    def __init__(self, what: str, made: dict):
        # -P: no module from the working folder.
        self.process = subprocess.Popen([sys.executable, "-P", "-c", START, ROOT], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
        try:
            self.ask(what, made)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def ask(self, what: str, question: dict) -> dict:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise UserError(f"{what}: it takes more than {SECONDS} s of computing, or more memory than there is")
        reply = json.loads(line)
        if "error" in reply:
            raise UserError(f"{what}: {reply['error']}")
        return reply


class TemplateProcess(SandboxProcess):
    """write(where, messages, tools) -> (text, [(begin, end)] of what the assistant is to learn), by a chat template.

    UserErrors as in `SandboxProcess`, with the place `where`.
    """

    def __init__(self, template: ChatTemplate, roles: dict[str, str], ends: list[str]):
        self.template = template
        super().__init__(f"the chat template in {template.file} is none",
                         {"source": template.source, "roles": roles, "ends": ends})

    def write(self, where: str, messages: list[dict], tools: list | None) -> tuple[str, list]:
        reply = self.ask(f"{where} cannot be written by the chat template in {self.template.file}",
                         {"messages": messages, "tools": tools})
        return reply["text"], [(begin, end) for begin, end in reply["spans"]]

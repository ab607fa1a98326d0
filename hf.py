"""Hugging Face checkpoints <-> model.py: one rename rule (core/parameter_names.py), used in both directions.

    model = hf.load("path/to/folder", dtype=torch.bfloat16)        a folder, or hf://org/name@revision
    hf.save(model, "out/final", base="path/to/folder")             a folder that transformers and vLLM read
    python hf.py export out/legal/checkpoints/step_00001000 --out DIR
    python hf.py import model.Q8_0.gguf --out DIR

Tensors are copied one at a time into a model built on the meta device, so that the peak is the weights and one tensor.
What of a folder may be read, and how far, stands in core/foreign_files.py; no file is unpickled.
"""

import core.threads

import functools
import hashlib
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import torch

from core import cli, sharding
from core.architecture import ModelConfig, make_config, parse_config
from core.devices import DTYPES
from core.errors import UserError
from core.files import FolderKind, find_folder, new_folder, write_json, write_text
from core.foreign_files import (
    FLOATS,
    LICENCES,
    MODEL_FILES,
    TOKENIZER_SETTINGS,
    VOCABULARIES,
    check_tensor,
    first_line,
    list_tensors,
    load_pickle,
    open_tensors,
    own_file,
    own_files,
    read_own_json,
    read_tensor,
)
from core.output import escape
from core.parameter_names import (
    OF_OBJECTIVE,
    base_parameters,
    from_hf_name,
    is_of_experts,
    list_parts,
    split_experts,
    to_hf_name,
)
from core.settings_files import read_settings
from model import Model

# The bytes of a file that its fingerprint reads: all of up to 64 MB, else so many pieces of a MB, evenly spaced.
PIECES, PIECE = 64, 1 << 20
# The model folder that `save` writes; every card says who made it.
FOLDER = FolderKind("model folder", (
    "*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "README.md",
    *VOCABULARIES, *TOKENIZER_SETTINGS, *LICENCES), {"README.md": b"nanoCPT"})


# ---- folders

@dataclass(frozen=True)
class Base:
    """A model folder that is opened once and handed on, so that every reader sees the same files."""
    name: str                   # as the user wrote it: folder or hf:// id
    folder: Path                # where its files are on this machine
    revision: str | None        # its commit on the Hub; None: a plain folder
    # What a run makes of its config (model.max_positions); None: as config.json has it.
    changed: ModelConfig | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name

    @property
    def pinned(self) -> str:
        """The name with the commit that was opened, or the absolute path, so that the same files can be opened again
        from any folder."""
        if self.revision is None:
            return str(self.folder.absolute())
        return f"{self.name.partition('@')[0]}@{self.revision}"

    @functools.cached_property
    def settings(self) -> dict:
        """config.json, its known fields typed."""
        return read_settings(self.folder / "config.json", needed=True)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights by config.json; where it names none, that of the first one stored, or else fp32."""
        if known := DTYPES.get(self.settings.get("dtype") or self.settings.get("torch_dtype")):
            return known
        name, file = next(iter(tensor_files(self.folder).items()))
        with open_tensors(file) as opened:
            stored = FLOATS.get(opened.get_slice(name).get_dtype())
        return stored if stored in DTYPES.values() else torch.float32

    @functools.cached_property
    def config(self) -> ModelConfig:
        return self.changed or parse_config(self.settings, self.folder)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell these weights from others: a digest of each file's name, size and bytes. Of a file
        above 64 MB 64 pieces are read, the first (its header) and the last among them: training changes all of a model,
        and a change of single values in between is not seen."""
        digest = hashlib.sha256()
        for file in sorted(set(tensor_files(self.folder).values())):
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with open(file, "rb") as opened:
                for k in range(PIECES):
                    opened.seek(max(k * PIECE, k * (size - PIECE) // (PIECES - 1)))
                    digest.update(opened.read(PIECE))
        return digest.hexdigest()[:16]

    @functools.cached_property
    def facts(self) -> dict:
        """What a user should know before training the base: {"license": text, "chat_template": whether it has one}."""
        has_template = (own_file(self.folder / "chat_template.jinja") is not None
                        or bool(read_settings(self.folder / "tokenizer_config.json").get("chat_template")))
        stated = []
        if card := own_file(self.folder / "README.md"):
            with open(card, encoding="utf-8", errors="replace") as file:
                stated = [line.partition(":")[2].strip() for line in file.read(1 << 16).splitlines()[:60]
                          if line.startswith("license:")]
        files = [f"see {file.name}" for file in own_files(self.folder, ["LICENSE*"])]
        return {"license": next(filter(None, [*stated[:1], *files]), "not stated"), "chat_template": has_template}


def split_name(base: "str | Path | Base") -> tuple[str, str]:
    """(what other libraries call a base: org/name or a path, its commit or nothing)"""
    name = base.pinned if isinstance(base, Base) else str(base)
    return tuple(name.removeprefix("hf://").split("@"))[:2] if name.startswith("hf://") and "@" in name else (
        name.removeprefix("hf://"), "")


def open_base(path: "str | Path | Base") -> Base:
    """Open the model folder `path`; `hf://org/name@revision` is downloaded to, or found in, the Hub's cache.

    A Base is returned as it is. UserError where there is no such folder, or neither Hub nor cache gives it, and for a
    file of it that is not its own: it could neither be read nor, after hours of training, be copied to the export.
    """
    if isinstance(path, Base):
        return path
    path = str(path)
    if not path.startswith("hf://"):
        folder = find_folder(path)
        if not folder.is_dir():
            raise UserError(f"model folder {path} does not exist; give a Hugging Face folder or hf://org/name")
        own_files(folder, MODEL_FILES)
        return Base(path, folder, None)
    name, _, revision = path.removeprefix("hf://").partition("@")
    for weights in ("*.safetensors", "*.bin"):
        wanted = ["*.json", "*.jinja", "README.md", *VOCABULARIES, *LICENCES, weights]
        try:
            folder = Path(huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} could not be fetched from the Hub and is not in its cache: "
                            f"{first_line(error)}") from None
        if any(folder.glob(weights)):
            break
        # A branch may move between two requests to the Hub: the second names the commit that the first one found.
        revision = folder.name
    own_files(folder, MODEL_FILES)
    return Base(path, folder, folder.name)


# ---- loading

def tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: file} of model.safetensors, of pytorch_model.bin, or of the shards that the index of one names.

    UserError where there is none of them, where the index names what is not there (but the head, which a tied model
    lacks), and where a single file stands beside the index of others: only one of them is the model.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index, single = folder / f"{stem}.index.json", folder / stem
        if own_file(index):
            files = read_own_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise UserError(f"{index} has no weight_map from tensor names to file names")
            names = sorted(set(files.values()))
            for name in names:
                if Path(name).name != name or name in ("", ".", ".."):
                    raise UserError(f"{index} points outside its folder: {name!r}")
                if own_file(folder / name) is None:
                    raise UserError(f"{index} names {name}, which is missing; the download is incomplete")
            if own_file(single) and stem not in names:
                raise UserError(f"{folder} holds {stem} and {index.name}, which names other files: two models in one "
                                f"folder; remove the one that is not meant")
            held = {name: set(list_tensors(folder / name)) for name in names}
            lost = [tensor for tensor, name in files.items() if tensor not in held[name] and from_hf_name(tensor)]
            if odd := [tensor for tensor in lost if tensor != "lm_head.weight"]:
                raise UserError(f"{folder / files[odd[0]]} does not hold {odd[0]}, though the index "
                                f"says so")
            return {tensor: folder / name for tensor, name in files.items() if tensor in held[name]}
        if own_file(single):
            return dict.fromkeys(list_tensors(single), single)
    raise UserError(f"{folder} holds no model.safetensors, no index of one and no pytorch_model.bin")


def load(path, dtype: torch.dtype = torch.float32, device="cpu") -> Model:
    """The model of a Base, a Hugging Face folder or an hf:// id, in `dtype` on `device`; UserErrors as in `fill`."""
    base = open_base(path)
    with torch.device("meta"):
        model = Model(base.config).to(dtype)
    find_weights(model, base.folder)
    model.to_empty(device=device).tie()
    fill(model, base.folder)
    return model


def find_weights(model: Model, folder: Path) -> dict[str, tuple[str, Path]]:
    """{name of a parameter of the base: (its tensor's name, file)}; UserError where a tensor is missing, left over,
    there twice, or of another shape or type. Only the files' headers are read, and `model` may be on the meta device:
    ask this before memory is taken for what a config.json says and the files do not hold."""
    files, family = {}, model.config.family
    wanted = {part: p.shape[1:] if is_of_experts(name) else p.shape for name, p in base_parameters(model.whole).items()
              for part in list_parts(name, p.shape[0])}
    for hf_name, file in tensor_files(folder).items():
        if (name := from_hf_name(hf_name)) in files:
            raise UserError(f"{folder} holds one tensor twice, as {name_some([files[name][0], hf_name])}")
        if name is not None:
            files[name] = hf_name, file
    tied_head = {"head.weight"} if model.config.tie_word_embeddings else set()
    if left_over := [hf_name for name, (hf_name, _) in files.items() if name not in wanted]:
        raise UserError(f"{folder} holds tensors this model has no place for, among them {name_some(left_over)}")
    if missing := [to_hf_name(name, family) for name in wanted if name not in files.keys() | tied_head]:
        raise UserError(f"{folder} lacks tensors the model needs, among them {name_some(missing)}")
    for file in sorted({file for _, file in files.values()}):
        with open_tensors(file) as opened:
            for name, (hf_name, place) in files.items():
                if place == file:
                    check_tensor(opened, hf_name, file, wanted[name])
    return files


@torch.no_grad()
def fill(model: Model, folder: Path, layout=lambda full, parameter: full):
    """Copy its tensor in `folder` into every parameter of the base; UserError as in `find_weights`, and where values
    are not finite. layout(full, parameter) gives the part of a full tensor that a shard holds."""
    check_tied_head(model.config, dict(find_weights(model, folder).values()), folder)
    for _, place, full in read_weights(model, folder):
        place.fill(full, layout) if isinstance(place, torch.nn.Module) else place.copy_(layout(full, place))


def read_weights(model: Model, folder: Path):
    """Yield (name, parameter, its full tensor in `folder`, in its dtype), one by one; UserErrors as in `fill`."""
    files = find_weights(model, folder)
    for name, parameter in base_parameters(model).items():
        # A tied head is the embedding, and may be absent.
        if name in files or is_of_experts(name):
            shape = parameter.shape[1:] if is_of_experts(name) else parameter.shape
            parts = [read_tensor(*files[part], shape, parameter.dtype) for part in list_parts(name, parameter.shape[0])]
            yield name, parameter, torch.stack(parts) if is_of_experts(name) else parts[0]
    load_pickle.cache_clear()


def name_some(names: list[str]) -> str:
    """The first five of the names, and of how many; with what it means that some belong to quantised weights."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    quantised = any(re.search(r"(qweight|SCB|absmax|weight_packed|weight_scale\w*)$", name) for name in names)
    hint = "; these are quantised weights: take the full-precision model that they were made from" if quantised else ""
    return ", ".join(names[:5]) + rest + hint


def check_tied_head(config: ModelConfig, stored: dict[str, Path], folder) -> None:
    """UserError where the config ties the head to the embedding and `stored` {tensor name: file} has another head."""
    names, shape = ("lm_head.weight", "model.embed_tokens.weight"), (config.vocab_size, config.hidden_size)
    if config.tie_word_embeddings and set(names) <= stored.keys():
        head, embedding = (read_tensor(name, stored[name], torch.Size(shape)) for name in names)
        if not torch.equal(head.to(embedding.dtype), embedding):
            raise UserError(f"{folder}/config.json says tie_word_embeddings, but lm_head.weight differs from the "
                            f"embedding; set tie_word_embeddings to false there")


# ---- saving

def save(model: Model, path, base=None, state: dict | None = None, card: str = "", tokenizer=None, scratch=False,
         pad_id: int | None = None, causal: bool = True, shard_bytes: int = 5 * 10**9):
    """Write `model` as a Hugging Face folder; one that `save` made at `path` is replaced when the new one is complete.

    base       a Base, folder or hf:// id it came from; its tokenizer files and licence are copied byte for byte, and
               the keys of its config that we do not know are kept
    state      {our name: full tensor} of a model whose parameters are sharded
    card       Markdown for the model card, e.g. the table of before and after
    tokenizer  a folder or file whose tokenizer takes the place of the base's
    scratch    the weights did not come from the base, only the sizes, and the card says so
    pad_id     the id of a padding token that the base does not have yet
    causal     whether it generates text, as the card then says
    """
    path, config = Path(path), model.config
    base = open_base(base) if base else None
    # A tied head is not stored: it is the embedding.
    tensors = {to_hf_name(name, config.family): tensor.detach().cpu().contiguous()
               for name, tensor in split_experts(state or model.state_dict(), copy=True).items()
               if not (config.tie_word_embeddings and name == "head.weight") and not name.startswith(OF_OBJECTIVE)}
    dtype = next(iter(tensors.values())).dtype
    if name := sharding.find_not_finite(tensors):
        raise UserError(f"{path} was not written: {name} holds NaN or infinity in {str(dtype).removeprefix('torch.')}; "
                        f"export in float32 or bfloat16 if the weights are too large for float16, else train again")
    pad = {} if pad_id is None else {"pad_token_id": pad_id}
    with new_folder(path, overwrite=True, kind=FOLDER) as out:
        huggingface_hub.save_torch_state_dict(tensors, out, max_shard_size=shard_bytes)
        known = make_config(config, dtype, base.settings if base else {}) | pad
        write_json(out / "config.json", known)
        # Only the token ids: servers take sampling values found here as their defaults, and a base model has none.
        if base:
            known |= read_settings(base.folder / "generation_config.json") | pad
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: known[name] for name in names if known.get(name) is not None}
        write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
        if base:
            copy_files(base.folder, LICENCES, out)
        if tokenizer or base:
            copy_tokenizer(Path(tokenizer or base.folder), out)
        write_text(out / "README.md", make_card(None if scratch else base, path.name, card, causal))


def copy_files(folder: Path, patterns, out: Path):
    for file in own_files(folder, patterns):
        shutil.copyfile(file, out / file.name)


def copy_tokenizer(source: Path, out: Path):
    """Copy the tokenizer of a folder, or a tokenizer file (under the usual name) with the settings beside it."""
    pair = ("vocab.json", "merges.txt")
    vocabulary = VOCABULARIES if source.is_dir() else pair if source.name in pair else ()
    copy_files(source if source.is_dir() else source.parent, TOKENIZER_SETTINGS + vocabulary, out)
    if not vocabulary:
        shutil.copyfile(source, out / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model"))


def make_card(base: Base | None, name: str, card: str, causal: bool = True) -> str:
    """The model card: front matter as the Hub reads it, and `card`. causal: whether the model generates text."""
    lines = ["---", "library_name: transformers", *(["pipeline_tag: text-generation"] if causal else []), "tags:",
             "- continued-pretraining"]
    if base:
        known = base.facts["license"]
        if base.name.startswith("hf://"):
            lines += [f"base_model: {base.name.removeprefix('hf://').partition('@')[0]}",
                      "base_model_relation: finetune"]
        # Neither a licence nor the name of a folder may begin a line of the front matter.
        if not known.startswith(("see", "not")) and re.fullmatch(r"[\w.+ -]+", known):
            lines.append(f"license: {known}")
    origin = "Pretrained from scratch"
    if base:
        origin = f"Continued pretraining of `{escape(Path(base.name).name, line=True).replace('`', '_')}`"
    return "\n".join([*lines, "---", "", f"# {name}", "", f"{origin} with nanoCPT.", "", card, ""])


# ---- its commands

@dataclass(kw_only=True)
class Export:
    """Write a training checkpoint, of any number of ranks, as one Hugging Face folder: the weights, or the base with
    the adapter merged in, in the type that the run exports."""

    checkpoint: cli.Positional[str]
    """The checkpoint: out/RUN/checkpoints/step_N."""
    output: cli.Output


def export_command(options: Export) -> dict:
    more = ["--overwrite"] if options.output.overwrite else []
    print(cli.run_command("stages/export.py", options.checkpoint, "--out", options.output.out, *more), end="")
    return {"checkpoint": options.checkpoint, "out": options.output.out}


@dataclass(kw_only=True)
class Import:
    """Write the Llama in a GGUF file as a Hugging Face folder. What its quantisation lost stays lost."""

    file: cli.Positional[str]
    """The file: model.gguf."""
    dtype: cli.Dtype = "bfloat16"
    """The type of the weights."""
    output: cli.Output


def import_command(options: Import) -> dict:
    more = ["--overwrite"] if options.output.overwrite else []
    print(cli.run_command("stages/import_gguf.py", options.file, "--dtype", options.dtype, "--out", options.output.out,
                          *more), end="")
    return {"file": options.file, "out": options.output.out}


def main() -> int:
    return cli.run("hf.py", __doc__, {"export": (Export, export_command), "import": (Import, import_command)})


if __name__ == "__main__":
    sys.exit(main())

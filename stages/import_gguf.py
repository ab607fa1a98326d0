"""The Llama in a GGUF file as a Hugging Face folder: what `python hf.py import` starts. It stands here, because what a
stranger's file says of itself is tried as model and tokenizer, which stand on other floors, before a folder is made."""

import core.threads

import sys
from pathlib import Path

import torch

import hf
from core import cli
from core.devices import DTYPES
from core.files import new_folder
from core.foreign_files import LICENCES
from core.gguf_files import write_folder
from model import Model
from text import vocabulary


def import_gguf(options: hf.Import) -> dict:
    """Write the folder; UserError, and none, for what `write_folder` refuses and for what no reader of ours takes."""
    with new_folder(options.output.out, options.output.overwrite, hf.FOLDER) as out:
        write_folder(options.file, out, DTYPES[options.dtype])
        hf.copy_files(Path(options.file).parent, LICENCES, out)
        with torch.device("meta"):
            model = Model(hf.open_base(out).config)
        hf.find_weights(model, out)
        vocabulary.load(out)
    print(f"{options.output.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {options.dtype}")
    return {"file": options.file, "out": options.output.out}


def main() -> int:
    return cli.run("hf.py import", __doc__, (hf.Import, import_gguf))


if __name__ == "__main__":
    sys.exit(main())

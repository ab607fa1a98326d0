"""The tensors of a checkpoint folder: which file holds which, and reading them one at a time.

Files are model.safetensors, or shards with an index beside them, or PyTorch's older pytorch_model.bin in the same two
forms. No file is unpickled: a .bin is read through torch.load's weights_only, which refuses everything but tensors.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from core.errors import UserError
from core.files import read_object


def tensor_files(folder: Path) -> dict[str, Path]:
    """{tensor name: file} of a checkpoint; UserError where there is none, or its index names what is not there."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index, single = folder / f"{stem}.index.json", folder / stem
        if index.exists():
            files = read_object(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise UserError(f"{index} has no weight_map from tensor names to file names")
            for name in set(files.values()):
                if Path(name).name != name or name in (".", ".."):
                    raise UserError(f"{index} points outside its folder: {name!r}")
                if not (folder / name).is_file():
                    raise UserError(f"{index} names {name}, which is missing; the download is incomplete")
            return {tensor: folder / name for tensor, name in files.items()}
        if single.exists():
            with open_tensors(single) as file:
                return dict.fromkeys(file.keys(), single)
    raise UserError(f"{folder} holds no model.safetensors, no index of one and no pytorch_model.bin")


class BinFile:
    """A pytorch_model.bin with the interface of safetensors' safe_open, memory-mapped."""

    def __init__(self, path: Path):
        self.tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self.keys, self.get_tensor = self.tensors.keys, self.tensors.__getitem__

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.tensors.clear()


def open_tensors(path: Path):
    """A context with keys() and get_tensor(name); UserError where the file is damaged or holds more than tensors."""
    try:
        return BinFile(path) if path.suffix == ".bin" else safe_open(path, framework="pt")
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is damaged or cut short: {str(error).splitlines()[0]}") from None
    except Exception as error:
        # weights_only met code and raised pickle.UnpicklingError, or a broken pickle raised what it likes.
        raise UserError(f"{path} is refused, it holds more than tensors: {str(error).splitlines()[0]}") from None

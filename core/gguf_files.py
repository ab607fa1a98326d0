"""A Llama model in a GGUF file, as llama.cpp and its kin keep it, written as a Hugging Face folder.

Quantised weights are brought back by the `gguf` package (extra `real`): the folder holds what llama.cpp computes with,
not what the model was before it was quantised, and what that rounding lost is not to be had again. llama.cpp turns
pairs of neighbours in a head, Hugging Face the two halves of it, so that the rows of q and k stand in another order.
Of a kind of model or tokenizer that is not known here nothing is guessed: it is refused by name.
"""

import json
import re
import reprlib
from pathlib import Path

import huggingface_hub
import numpy as np
import torch

from core.architecture import ModelConfig, make_config
from core.errors import UserError
from core.files import write_json, write_text
from core.foreign_files import find_odd, own_file
from core.output import escape
from core.settings_files import FILES, WRONG

# gguf's name of a layer's part and Hugging Face's; of what stands outside of the layers.
OF_LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# How a text is cut into words, by llama.cpp's name of it; the steps are those of the models' own tokenizer.json.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPLITS = {"gpt-2": BYTES, "smollm": {"type": "Sequence", "pretokenizers": [
    {"type": "Digits", "individual_digits": True}, BYTES]}}
# Of the types of tokens that GGUF has: control tokens, and those that a user has added.
CONTROL, ADDED = 3, 4
ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# What values of the header are, beside the sizes. A file may be a stranger's.
SHAPES = {**dict.fromkeys(("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre",
                           "tokenizer.chat_template"), str), "tokenizer.ggml.tokens": list,
          **{f"tokenizer.ggml.{name}_token_id": int for name in ROLES.values()}}


def write_folder(path, folder: Path, dtype: torch.dtype) -> None:
    """Write the model in the GGUF file `path` into `folder`: weights in `dtype`, config, tokenizer, chat template and
    card. UserError for a file that is no GGUF or damaged, and for what no Hugging Face Llama can be."""
    path = Path(path)
    fields, found, dequantize = read_file(path)
    config = read_config(fields, {tensor.name: tensor for tensor in found}, path)
    tensors = {}
    for tensor in found:
        name, heads = name_tensor(tensor.name, config, path)
        try:
            values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        except NotImplementedError:
            raise UserError(f"{path} holds {name} as {tensor.tensor_type.name}, which is not read: take the Hugging "
                            f"Face folder that it was made from") from None
        if heads and (values.ndim != 2 or len(values) % (2 * heads)):
            raise UserError(f"{path} holds {name} of shape {values.shape}, which is not rows of {heads} heads")
        tensors[name] = torch.from_numpy(join_pairs(values, heads) if heads else values).to(dtype)
    tokenizer, roles = read_tokenizer(fields, path)
    # What the head would repeat is not stored, as in hf.save.
    huggingface_hub.save_torch_state_dict(tensors, folder)
    ids = {f"{role}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for role, name in ROLES.items()
           if role in roles and role != "unk"}
    write_json(folder / "config.json", make_config(config, dtype, ids))
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_text(folder / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False) + "\n")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_input_names": ["input_ids", "attention_mask"],
                "model_max_length": config.max_position_embeddings,
                "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token")),
                **{f"{role}_token": token for role, token in roles.items()}}
    if template := fields.get("tokenizer.chat_template"):
        settings["chat_template"] = template
        write_text(folder / "chat_template.jinja", template)
    write_json(folder / "tokenizer_config.json", settings)
    write_text(folder / "README.md", make_card(fields, path))


def read_file(path: Path) -> tuple:
    """({name: value} of the header, the tensors as the package has them, its function that makes floats of one)."""
    try:
        import gguf
    except ImportError:
        raise UserError("a GGUF file is read with the package gguf: pip install gguf") from None

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # Theirs gives what there is: of a list of 2^60 elements in a small file it would read nothing for ever.
            found = super()._get(offset, dtype, count, override_order)
            if len(found) < count:
                raise ValueError("it is shorter than it says")
            return found

    if own_file(path) is None:
        raise UserError(f"{path} does not exist")
    try:
        reader = Reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    # The package checks little of what it reads, and a damaged file ends in whatever comes of that.
    except Exception as error:
        raise UserError(f"{path} is no GGUF file, or damaged ({error or type(error).__name__})") from None
    known = {name: fields[name] for name in SHAPES if name in fields}
    if odd := find_odd(known, {name: SHAPES[name] for name in known}):
        raise UserError(f"{path} holds {odd}, which is of another type than it must be; it is damaged, fetch it again")
    return fields, reader.tensors, gguf.quants.dequantize


def read_config(fields: dict, tensors: dict, path: Path) -> ModelConfig:
    """The sizes in the file's header; UserError where it is no plain Llama."""
    kind = fields.get("general.architecture")
    if kind != "llama":
        raise UserError(f"{path} holds a model of the architecture {kind!r}; only llama is read from GGUF: take the "
                        f"Hugging Face folder that it was made from")
    scaling = fields.get("llama.rope.scaling.type", "none")
    odd = [*([f"{fields['llama.expert_count']} experts"] if fields.get("llama.expert_count") else []),
           *([f"positions scaled by {scaling}"] if scaling != "none" or "rope_freqs.weight" in tensors else [])]
    if odd:
        raise UserError(f"{path} holds a Llama with {odd[0]}, which is not read from GGUF: take the Hugging Face "
                        f"folder that it was made from")
    names = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
             "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
             "max_position_embeddings": "context_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
    if lost := [name for name in (*(f"llama.{name}" for name in names.values()), "tokenizer.ggml.tokens")
                if name not in fields] or [name for name in ("token_embd.weight",) if name not in tensors]:
        raise UserError(f"{path} has no {lost[0]}; the file is incomplete, fetch it again")
    sizes = {name: fields[f"llama.{name_there}"] for name, name_there in names.items()}
    sizes |= {"vocab_size": len(fields["tokenizer.ggml.tokens"]),
              "num_key_value_heads": fields.get("llama.attention.head_count_kv"),
              "head_dim": fields.get("llama.attention.key_length"),
              "rope_theta": fields.get("llama.rope.freq_base", 10000.0)}
    for name, value in sizes.items():
        kind = FILES["config.json"][name]
        try:
            sizes[name] = None if value is None else kind.convert(value)
        except WRONG:
            raise UserError(f"{path} says {name} {reprlib.repr(value)}, but it must be {kind.wanted}") from None
    # The header holds 1e-5 as a float32; the shortest decimal that is the same float32 is what was meant.
    sizes["rms_norm_eps"] = float(str(np.float32(sizes["rms_norm_eps"])))
    config = ModelConfig(**sizes, tie_word_embeddings="output.weight" not in tensors)
    for name in ("rope.dimension_count", "attention.value_length"):
        if (size := fields.get(f"llama.{name}", config.head_dim)) != config.head_dim:
            raise UserError(f"{path} says {name} {reprlib.repr(size)} of heads of {config.head_dim}; only heads that "
                            f"are turned as a whole, and whose values are as wide, are read")
    return config


def name_tensor(name: str, config: ModelConfig, path: Path) -> tuple[str, int]:
    """(Hugging Face's name of a tensor, the heads whose rows stand in llama.cpp's order, or 0)."""
    parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    layer, part = parts.groups() if parts else (None, None)
    known = (OF_LAYER if layer else OUTSIDE).get(part)
    if known is None:
        raise UserError(f"{path} holds the tensor {escape(name, line=True)}, for which a Llama has no place")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part, 0)
    return f"model.layers.{layer}.{known}.weight" if layer else f"{known}.weight", heads


def join_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * (d/2, 2)], as llama.cpp turns them, in Hugging Face's order [heads * (2, d/2)]."""
    pairs = values.reshape(heads, -1, 2, values.shape[1])              # heads, d/2, 2, D
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def read_tokenizer(fields: dict, path: Path) -> tuple[dict, dict[str, str]]:
    """(tokenizer.json, {role: token}) of a byte-level BPE; UserError for another kind of tokenizer."""
    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in SPLITS:
        raise UserError(f"{path} has a tokenizer of the kind {kind!r} that splits text as {split!r}; read are gpt2 "
                        f"with {', '.join(SPLITS)}: take the Hugging Face folder that it was made from")
    tokens, types, merges = (fields.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    ids = {role: i for role, name in ROLES.items() if (i := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None}
    fits = all(isinstance(each, list) for each in (tokens, types, merges)) and len(tokens) == len(types) and all(
        isinstance(each, str) for each in tokens + merges) and all(i in range(len(tokens)) for i in ids.values())
    if not fits:
        raise UserError(f"{path} has a damaged tokenizer: its lists of tokens, types and merges do not fit together")
    added = [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": type_of == CONTROL}
             for i, type_of in enumerate(types) if type_of in (CONTROL, ADDED)]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {token: i for i, token in enumerate(tokens)},
             "merges": [merge.split(" ") for merge in merges]}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return ({"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
             "pre_tokenizer": SPLITS[split], "post_processor": None, "decoder": decoder, "model": model},
            {role: tokens[i] for role, i in ids.items()})


def make_card(fields: dict, path: Path) -> str:
    licence = str(fields.get("general.license", ""))
    stated = [f"license: {licence}"] if re.fullmatch(r"[\w.+-]+", licence) else []
    name = escape(str(fields.get("general.name", path.stem)), line=True)
    return "\n".join(["---", "library_name: transformers", "pipeline_tag: text-generation", *stated, "---", "",
                      f"# {name}", "", f"Read by nanoCPT from {escape(path.name, line=True)}: the weights are those of "
                      "the quantised file, not those that the model had before.", ""])

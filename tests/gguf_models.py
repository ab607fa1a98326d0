"""GGUF files of small Llamas, as llama.cpp's converter writes them; the package `gguf` does the writing."""

import json
from pathlib import Path

import numpy as np

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "q_proj": "attn_q",
         "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
CONTROL = ["<b>", "<a>"]                    # EOS and BOS, behind the other tokens


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py has it in LlamaModel.permute."""
    return (weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
            .swapaxes(1, 2).reshape(weights.shape))


def add_joins(tokenizer: Path) -> dict:
    """A tokenizer.json in which numbers and blanks would be joined, if the words that text is cut into let them."""
    known = json.loads((tokenizer / "tokenizer.json").read_text())
    size = len(known["model"]["vocab"])
    known["model"]["merges"] += [["1", "2"], ["Ġ", "Ġ"]]
    known["model"]["vocab"] |= {"12": size, "ĠĠ": size + 1}
    return known


def write_gguf(gguf, path: Path, model, known: dict, kind="F32", split="gpt-2", without=(), architecture="llama",
               more=(), more_as=np.float32, odd=None, **fields) -> Path:
    """Write transformers' Llama `model` with the BPE of the tokenizer.json `known`; matrices are stored as `kind`.

    without: fields to leave out. more: names of further tensors, of the type more_as. odd: {key: value} of fields as no
    converter writes them. fields: other values for the header.
    """
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    tokens = sorted(known["model"]["vocab"], key=known["model"]["vocab"].get)
    filled = {"context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
              "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
              "head_count": config.num_attention_heads, "head_count_kv": config.num_key_value_heads,
              "layer_norm_rms_eps": config.rms_norm_eps, "rope_freq_base": config.rope_parameters["rope_theta"],
              "tokenizer_model": "gpt2", "tokenizer_pre": split, "token_list": [*tokens, *CONTROL],
              "token_types": [1] * len(tokens) + [3, 3],
              "token_merges": [" ".join(merge) for merge in known["model"]["merges"]],
              "bos_token_id": len(tokens) + 1, "eos_token_id": len(tokens), "chat_template": TEMPLATE,
              "add_bos_token": True, "license": "apache-2.0", **fields}
    for name, value in filled.items():
        if name not in without:
            getattr(writer, f"add_{name}")(value)
    for key, value in (odd or {}).items():
        kinds = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        kinds[type(value)](key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        *place, _ = name.removeprefix("model.").split(".")
        if config.tie_word_embeddings and place == ["lm_head"]:
            continue
        values = permute(tensor.numpy(), heads[place[-1]]) if place[-1] in heads else tensor.numpy()
        layer = f"blk.{place[1]}." if place[0] == "layers" else ""
        stored = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        writer.add_tensor(f"{layer}{NAMES[place[-1]]}.weight", gguf.quants.quantize(values, stored), raw_dtype=stored)
    for name in more:
        writer.add_tensor(name, np.ones(16, more_as))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""Chat templates as their models publish them, conversations for them, and small tokenizers that carry them."""

from pathlib import Path

ALTERNATE = ("{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles "
             "must alternate user/assistant/user/assistant/...') }}{% endif %}")
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
          "+ '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
TEMPLATES = {
    "chatml": CHATML,
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
        "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}"
        "{% endif %}{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and system_message != "
        "false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
        "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
        "content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + "
        "eos_token }}{% endif %}{% endfor %}"),
    "llama3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == "
        "0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}{{ '[INST] ' + "
        "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
        "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
        "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}{% set role "
        "= 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + "
        "message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{'<start_of_turn>model\\n'}}{% endif %}"),
    # With blocks that say what the assistant wrote, as training templates have them.
    "generation": (
        "{%- for message in messages %}\n    {%- if message.role == 'assistant' %}\n        {{- "
        "'<|im_start|>assistant\\n' }}\n        {%- generation %}\n            {{- message.content + '<|im_end|>' }}\n"
        "        {%- endgeneration %}\n        {{- '\\n' }}\n    {%- else %}\n        {{- '<|im_start|>' + "
        "message.role + '\\n' + message.content + "
        "'<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    "
        "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}"),
    # What Qwen 3 does with thoughts: they stay in the last answer alone.
    "thinking": (
        "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' %}"
        "{%- set ns = namespace(thought='') %}{%- if '</think>' in content %}{%- set ns.thought = "
        "content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{%- set content = "
        "content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}{%- if loop.last %}{{- '<|im_start|>assistant\\n"
        "<think>\\n' + ns.thought + '\\n</think>\\n\\n' + content }}{%- else %}{{- '<|im_start|>assistant\\n' + "
        "content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + "
        "'<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- endif %}"),
}
# (bos, eos, further special tokens) of the model that each is from.
SPECIALS = {
    "chatml": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]), "llama2": ("<s>", "</s>", []),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "mistral": ("<s>", "</s>", []), "zephyr": ("<s>", "</s>", []),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "generation": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
    "thinking": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>"]),
}
TURNS = [{"role": "user", "content": "Name a colour of the sky, please."},
         {"role": "assistant", "content": "Blue, or grey."}, {"role": "user", "content": "And of the\ngrass?"},
         {"role": "assistant", "content": "Green.\n\nMostly."}]
# What the assistant writes around an answer: all that follows the prompt that it answers, up to what ends its turn.
AROUND = {"chatml": ("", "<|im_end|>"), "llama2": (" ", " </s>"), "llama3": ("", "<|eot_id|>"),
          "mistral": ("", "</s>"), "zephyr": ("", "</s>"), "gemma": ("", "<end_of_turn>"),
          "generation": ("", "<|im_end|>")}
ANSWERS = {name: [f"{before}{turn['content']}{end}" for turn in TURNS[1::2]]
           for name, (before, end) in AROUND.items()}


def make_tokenizer(base: Path, folder: Path, name: str):
    """transformers' tokenizer with a template and its model's special tokens, from one in `base`; saved in `folder`."""
    from transformers import PreTrainedTokenizerFast
    tok = PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    bos, eos, more = SPECIALS[name]
    tok.add_special_tokens({"bos_token": bos, "eos_token": eos, "pad_token": eos})
    if more:
        tok.add_tokens(more, special_tokens=True)
    tok.chat_template = TEMPLATES[name]
    tok.save_pretrained(folder)
    return tok

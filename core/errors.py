"""The user's mistakes: one clear line that says what, which value and what to do."""

import difflib

# What other trainers (transformers, PEFT, LLaMA-Factory, Axolotl, nanoGPT) call a setting: our names, the first that a
# command has is meant.
FAMILIAR = {theirs: ours.replace("|", " ") for ours, *names in map(str.split, """
optim.lr learning_rate
optim.min_lr min_learning_rate lr_min
optim.schedule lr_scheduler_type lr_scheduler
optim.warmup_steps num_warmup_steps warmup_iters
optim.clip max_grad_norm grad_clip gradient_clipping
optim.name optim optimizer
optim.beta1 adam_beta1
optim.beta2 adam_beta2
optim.eps adam_epsilon
data.context cutoff_len max_seq_length max_seq_len max_length block_size seq_length sequence_len model_max_length
data.packing sample_packing
data.sources.NAME.path dataset datasets dataset_name dataset_dir train_file
objective.mask_ratio mlm_probability
train.micro_batch_size per_device_train_batch_size per_device_eval_batch_size
train.batch_size gradient_accumulation_steps train_batch_size global_batch_size
train.epochs num_train_epochs num_epochs
train.steps max_steps max_iters
train.save_every save_steps
train.keep save_total_limit
train.precision|dtype bf16 fp16 tf32 torch_dtype mixed_precision
eval.every eval_steps eval_interval
log.every logging_steps log_interval
log.wandb report_to wandb_project
model.path|model model_name_or_path base_model
model.tokenizer|tokenizer tokenizer_name tokenizer_name_or_path
model.activation_checkpointing gradient_checkpointing recompute_granularity activation_checkpoint
model.recompute_every selective_ac_option recompute_num_layers
parallel.strategy deepspeed fsdp
parallel.offload offload_param offload_optimizer fsdp_offload_params cpu_offload
out output_dir out_dir
lora.rank r lora_r lora_rank finetuning_type adapter
lora.alpha lora_alpha
lora.dropout lora_dropout
lora.targets lora_target lora_target_modules target_modules
lora.rslora use_rslora
lora.dora use_dora
lora.b_lr_ratio loraplus_lr_ratio
lora.base load_in_4bit load_in_8bit quantization_bit
""".strip().splitlines()) for theirs in names}


class UserError(ValueError):
    """A mistake of the user's. A command prints its text as one line and exits with `status`.

    Any other exception that reaches the command line is a bug of ours: it shows its traceback and exits with 1.
    """

    def __init__(self, text: str, status: int = 2):
        super().__init__(text)
        self.status = status


class Diverged(UserError):
    """What a run computes is not finite, or spikes, so that it cannot go on; its report says so."""


def nearest(word: str, known) -> str:
    """`; did you mean X?` for the one of the `known` words that is meant, or an empty string where none is close.

    That is the one that other trainers call `word`, or with the same last part in another section, or the closest.
    """
    if len(word) > 100:
        return ""
    known, meant = list(known), FAMILIAR.get(_last_part(word), word).split()
    same = [name for target in meant for name in known if _last_part(name) == _last_part(target)]
    close = difflib.get_close_matches(meant[0] if same else word, same or known, n=1, cutoff=0 if same else 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _last_part(name: str) -> str:
    """lr of optim.lr, max_new_tokens of --max-new-tokens"""
    return name.lstrip("-").rpartition(".")[2].replace("-", "_").lower()

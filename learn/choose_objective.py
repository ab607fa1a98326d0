"""Which objective a run has, by its settings. To add one, write its class in learn/, and name it here."""

import sys
from dataclasses import dataclass, field, replace
from typing import Literal

from core import cli
from core.config import is_on, setting
from core.errors import UserError
from learn.electra import Electra
from learn.infilling import UL2, FillInTheMiddle, Span
from learn.multitask import Mixture, Weights
from learn.objectives import Causal, Masked, Objective
from learn.preference import DPO, IPO, ORPO
from learn.selective import Selective
from text import objective_tokens
from text.words import find_word_borders

PREFERENCES = {"dpo": DPO, "ipo": IPO, "orpo": ORPO}


@dataclass
class ObjectiveConfig:
    name: Literal["causal", "masked", "selective", "electra", "span", "ul2", "fim", "mixture", "dpo", "ipo",
                  "orpo"] = "causal"
    """causal: predict the next token; masked: predict masked tokens from both sides; selective: causal, but only the
    tokens count whose loss is the most above that of the reference (Rho-1); electra: say which tokens a small generator
    has replaced, from both sides; span: write the spans that a text lacks behind it (T5); ul2: the same with seven
    kinds of spans; fim: fill in the middle of code; mixture: each sequence by one of several, as objective.weights say;
    dpo, ipo, orpo: of two answers make the chosen one likelier than the rejected one, from sources packed with --format
    preference"""
    weights: Weights = field(default_factory=Weights)
    mask_ratio: float = setting(0.15, above=0, at_most=1)
    """masked, electra, span: share of the positions that are predicted"""
    whole_words: bool = False
    """masked: choose words instead of tokens"""
    span_length: float = setting(3.0, at_least=1, at_most=1e6)
    """span: mean tokens of a span"""
    fim_rate: float = setting(0.5, at_least=0, at_most=1)
    """fim: share of the documents whose middle moves to the end"""
    spm_share: float = setting(0.5, at_least=0, at_most=1)
    """fim: share of those that begin with the suffix instead of the prefix"""
    mask_token_id: int | None = setting(None, at_least=0, below=2**31)
    """masked, electra: id that stands for a masked token; default: the tokenizer's mask token"""
    generator_ratio: float = setting(0.25, above=0, at_most=1)
    """electra: the generator's widths as a share of the model's; it has as many blocks"""
    discriminator_weight: float = setting(50.0, above=0, at_most=1e6)
    """electra: weight of the discriminator's loss beside the generator's"""
    keep: float = setting(0.6, above=0, at_most=1)
    """selective: share of each document's targets that count"""
    reference: str = ""
    """model folder or hf:// id of the reference model, where the objective has one; default: the base"""
    beta: float = setting(0.1, above=0, at_most=1e3)
    """dpo, ipo: how closely the model is held to the reference, less where it is small; orpo: weight of the log odds"""
    precompute: bool = False
    """dpo, ipo: score all pairs with the reference once, before the first step; it then takes no memory and no time"""
    z_loss: float = setting(0.0, at_least=0, at_most=1e3)
    """weight of logsumexp(logits)^2 per target, which keeps logits from growing (PaLM, arXiv 2204.02311: 1e-4); it
    counts in training losses and not in evaluations"""


CAUSAL = ObjectiveConfig()
# The settings that each objective reads; a mixture reads those of its members too.
READS = {
    "causal": ("z_loss",), "masked": ("mask_ratio", "whole_words", "mask_token_id", "z_loss"),
    "selective": ("keep", "reference", "z_loss"),
    "electra": ("mask_ratio", "mask_token_id", "generator_ratio", "discriminator_weight", "z_loss"),
    "span": ("mask_ratio", "span_length", "z_loss"), "ul2": ("z_loss",), "fim": ("fim_rate", "spm_share", "z_loss"),
    "mixture": ("weights",), "dpo": ("beta", "reference", "precompute"), "ipo": ("beta", "reference", "precompute"),
    "orpo": ("beta",)}
# The objectives whose measures need the model alone, or a baseline beside it.
ALONE = ("causal", "masked", "span", "ul2", "fim", "mixture", *PREFERENCES)
# Those of models whose tokens see both sides alone.
BOTH_WAYS = ("masked", "electra")


@dataclass
class _Recipe:
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)


def read_settings(words: list[str]) -> ObjectiveConfig:
    """The settings of words such as --objective.name span. UserError for an objective that needs a second model."""
    config = cli.parse(_Recipe, list(words), recipe=True).objective
    if config.name not in ALONE:
        raise UserError(f"--objective.name is {config.name}, whose measures need a second model: a run writes them "
                        f"into eval.json, and eval.py knows those of {', '.join(ALONE)}")
    refuse_unread(config)
    return config


def refuse_unread(config: ObjectiveConfig):
    """UserError where a setting was changed that the objective does not read."""
    members = [name for name, weight in vars(config.weights).items() if weight] if config.name == "mixture" else []
    read = {"name", *(key for name in (config.name, *members) for key in READS[name])}
    for key, value in vars(CAUSAL).items():
        if key not in read and getattr(config, key) != value:
            owners = ", ".join(name for name, keys in READS.items() if key in keys)
            given = "set" if key == "weights" else repr(getattr(config, key))
            raise UserError(f"objective.{key} is {given}, but objective {config.name} does not read it, so it would do "
                            f"nothing; set objective.name to what does ({owners}), or leave it out")


def refuse_objective(c, ranks: int):
    """UserError for settings of a run that do not go with its objective, before anything is read."""
    if c.router.balance and c.objective.name in ("dpo", "ipo", "orpo"):
        raise UserError(f"router.balance weighs with the number of targets, and objective {c.objective.name} counts "
                        f"pairs; leave it out")
    refuse_unread(c.objective)
    name, lwf = c.objective.name, c.forget.lwf.alpha
    on = [method for method in ("ewc", "lwf", "freeze", "merge") if is_on(getattr(c.forget, method))]
    if on and name == "electra":
        raise UserError(f"forget.{on[0]} keeps what a model predicts, and with objective electra it predicts no "
                        f"tokens; leave one of them out")
    if c.lora.rank and name == "electra":
        raise UserError("objective electra trains a generator and a head of its own beside all of the model, and with "
                        "adapters the base does not train; leave out lora.rank")
    if c.parallel.shards(ranks) and name == "electra":
        raise UserError("objective electra shares the embeddings between two models, which FSDP would gather for one "
                        "of them alone; use --parallel.strategy ddp")
    if lwf and name == "selective":
        raise UserError("forget.lwf takes its KL on every target and objective selective leaves most out; use one of "
                        "them")
    if lwf and name == "mixture":
        raise UserError("forget.lwf compares the model with the base under one objective, and mixture has several; "
                        "leave one of them out")
    if name in ("selective", "dpo", "ipo") and c.model.init == "scratch" and not c.objective.reference:
        raise UserError(f"objective {name} compares with the model that the run begins from, and model.init scratch "
                        f"has none; name a base, or a reference with --objective.reference")
    if name in PREFERENCES:
        refuse_preferences(c)


def refuse_preferences(c):
    """UserError for settings under which answers could not be compared, or that do nothing in such a loss."""
    name = c.objective.name
    if not (c.data.mask_documents and c.data.reset_positions):
        raise UserError(f"objective {name} compares documents that stand in one sequence as if each stood alone; leave "
                        f"data.mask_documents and data.reset_positions true")
    if c.forget.lwf.alpha:
        raise UserError(f"forget.lwf has a divergence per token, and objective {name} a loss per pair; leave LwF out: "
                        f"objective.beta of dpo and ipo says how closely the base is kept")


def read_trained(identity: dict) -> tuple[str, int | None]:
    """(name, mask_token_id) of the objective of a run, by the identity that its checkpoints hold."""
    trained = identity.get("objective")
    return (trained.get("name"), trained.get("mask_token_id")) if isinstance(trained, dict) else ("causal", None)


def describe_both_ways(name: str, mask_id: int | None) -> str:
    """A line for the card of a model whose tokens see both sides; nothing of other models. mask_id None: that of the
    tokenizer's mask token."""
    if name not in BOTH_WAYS:
        return ""
    mask = "the tokenizer's mask token" if mask_id is None else f"token id {mask_id}"
    return (f"Trained with objective {name}: each token sees those before and after it, and {mask} stands for a masked "
            f"one. The causal class that config.json names hides what comes after a token, so this model does not "
            f"generate text as it is.\n\n")


def check_scoring(run: str, identity: dict, config: ObjectiveConfig):
    """A warning where a run of masked text is scored in another way; UserError for ELECTRA's models, which predict no
    tokens."""
    name, mask_id = read_trained(identity)
    if name == "electra":
        raise UserError(f"{run} was trained with objective electra, whose model predicts no tokens; eval_step_N.json "
                        f"and eval.json in it hold its measures")
    if name in BOTH_WAYS and config.name != name:
        mask = "" if mask_id is None else f" --objective.mask-token-id {mask_id}"
        print(f"warning: {run} was trained with objective {name} and is scored as {config.name}, where no token sees "
              f"those after it; set --objective.name {name}{mask}", file=sys.stderr)


def make_objective(config: ObjectiveConfig, mask_documents: bool, tokenizer, vocab_size: int) -> Objective:
    """The objective of the settings. UserError where it needs special tokens that are not in the vocabulary."""
    weights = vars(config.weights)
    if config.name == "mixture":
        members = {name: make_objective(replace(config, name=name, weights=Weights()), mask_documents, tokenizer,
                                        vocab_size) for name, weight in weights.items() if weight}
        return Mixture(members, weights)
    if config.name == "causal":
        return Causal(mask_documents, config.z_loss)
    if config.name == "selective":
        return Selective(mask_documents, config.keep, config.z_loss)
    if config.name in PREFERENCES:
        return PREFERENCES[config.name](config.beta, config.precompute)
    # Rows that only pad the embedding are no more drawn at random than special tokens are.
    special = {*tokenizer.special_ids, *tokenizer.missing_ids(vocab_size)} if tokenizer is not None else ()
    special = [i for i in special if i < vocab_size]
    if config.name in ("masked", "electra"):
        mask_id = find_mask(config, tokenizer, vocab_size)
        masking = mask_documents, mask_id, special, vocab_size, config.mask_ratio, config.z_loss
        if config.name == "masked":
            if config.whole_words and tokenizer is None:
                raise UserError("objective.whole_words needs a tokenizer, which says where words begin; name one with "
                                "--model.tokenizer")
            return Masked(*masking, find_word_borders(tokenizer, vocab_size) if config.whole_words else None)
        return Electra(*masking, generator_ratio=config.generator_ratio, weight=config.discriminator_weight)
    if tokenizer is None:
        raise UserError(f"objective {config.name} needs special tokens, and the base has no tokenizer that names them; "
                        f"name one with --model.tokenizer")
    if config.name == "fim":
        parts = objective_tokens.find_named(tokenizer, objective_tokens.PARTS) or objective_tokens.refuse_missing(
            "fim", "tokens for prefix, suffix and middle")
        return FillInTheMiddle(mask_documents, special, parts, config.fim_rate, config.spm_share, config.z_loss)
    sentinels = objective_tokens.find_sentinels(tokenizer) or objective_tokens.refuse_missing(config.name, "sentinels")
    if config.name == "ul2":
        modes = objective_tokens.find_named(tokenizer, objective_tokens.MODES)
        return UL2(mask_documents, special, sentinels, modes, config.z_loss)
    return Span(mask_documents, special, sentinels, config.mask_ratio, config.span_length, config.z_loss)


def find_mask(config: ObjectiveConfig, tokenizer, vocab_size: int) -> int:
    """The id of the mask token, of the settings or of the tokenizer. UserError where there is none."""
    mask_id = config.mask_token_id
    if mask_id is None and tokenizer is not None:
        mask_id = objective_tokens.find_mask(tokenizer)
    if mask_id is None:
        raise UserError(f"objective {config.name} needs a mask token and the tokenizer has none; python tokenizer.py "
                        "add --model DIR --for masked --out DIR2 makes a base that has one; or name an id that the "
                        "text does not use, e.g. --objective.mask-token-id 0")
    if not 0 <= mask_id < vocab_size:
        raise UserError(f"objective.mask_token_id is {mask_id}, outside the vocabulary of {vocab_size}")
    return mask_id

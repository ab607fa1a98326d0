"""A training checkpoint as one Hugging Face folder: what `python hf.py export` starts. It stands here, because adapters
are composed with their base floors above hf.py."""

import core.threads

import sys
from pathlib import Path

import eval as evaluation
import hf
from core import checkpoint, cli
from core.devices import DTYPES
from core.errors import UserError
from core.files import claim_folder
from learn.choose_objective import describe_both_ways, read_trained


def export_checkpoint(options: hf.Export) -> dict:
    """Write what a run that ended at the checkpoint would export, before a merge with its base. UserError where the
    checkpoint does not verify, or its base is not the one it was trained on."""
    path, out = Path(options.checkpoint), options.output.out
    if Path(out).resolve().is_relative_to(path.resolve()):
        raise UserError(f"--out {out} is in the checkpoint, which would be damaged by another file; choose another")
    with claim_folder(out, options.output.overwrite, hf.FOLDER):
        checkpoint.verify(path)
        model, state, name = evaluation.load_checkpoint(path)
        both_ways = describe_both_ways(*read_trained(state["identity"]))
        weights = {key: weight.to(DTYPES[state["dtype"]]) for key, weight in model.named_parameters()}
        hf.save(model, out, base=state["base"] or None, state=weights, scratch=state["identity"]["base"] is None,
                tokenizer=state["tokenizer"] if state["tokenizer"] != state["base"] else None,
                card=f"{both_ways}Step {state['step']} of a run: {name}.", causal=not both_ways)
    print(f"{out}: step {state['step']}, {name}, {state['dtype']}")
    return {"out": out, "step": state["step"], "model": name, "dtype": state["dtype"]}


def main() -> int:
    return cli.run("hf.py export", __doc__, (hf.Export, export_checkpoint))


if __name__ == "__main__":
    sys.exit(main())

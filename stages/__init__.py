"""The stages of a run in their order: build, describe, resume, evaluate."""

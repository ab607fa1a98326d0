"""The stages of a run in their order: build, resume, describe, finish."""

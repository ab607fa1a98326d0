"""From documents to tokens to a plan of what a run reads."""

"""What judges a model, a kernel or a speed; nothing that ships is here."""

"""Training beside or after surgery: the trainer, teachers, healing."""

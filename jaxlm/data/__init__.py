"""The data room: sources of text -> tokenizers -> token store -> rows to train on. All of it numpy; jax is not imported here."""

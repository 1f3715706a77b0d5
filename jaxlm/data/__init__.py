"""The data room: sources of text -> tokenizers -> token store -> rows to train on. All numpy, no jax."""

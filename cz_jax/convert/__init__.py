"""Hugging Face model folders: found, checked, read into parameters, written back, and their tokenizers and cards."""

import os

# transformers is here for tokenizers alone, and would advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

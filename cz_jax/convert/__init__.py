"""Hugging Face model folders: found, checked, read into parameters, written back, and their tokenizers and cards."""

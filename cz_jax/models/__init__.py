"""Qwen2 and Qwen3 as Flax modules: the weight table (`spec`) and the forward passes (`qwen`)."""

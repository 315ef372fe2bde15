"""Jitted sampling: how a token is drawn (`methods`), the compiled loop (`generate`), and a model in use (`engine`)."""

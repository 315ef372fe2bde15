"""Speaking with other nodes."""

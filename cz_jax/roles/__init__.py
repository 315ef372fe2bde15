"""The roles of a CodeZero node: who proposes tasks, solves them, judges the answers and learns from the rewards."""

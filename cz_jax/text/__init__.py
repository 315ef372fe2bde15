"""Text that models and peers wrote, read without ever running it: answers, proposals, verdicts.

Nothing of it is trusted. Sizes are checked first, then nesting, then syntax; only `Refused` and None come back.
"""

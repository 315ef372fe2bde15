"""Where training and evaluation tasks come from: our own, MBPP, CodeContests, or a file.

`stream` (the training order, through grain) is imported by name: it is heavier than loading tasks.
"""

from cz_jax.tasks.rows import LoadedTasks, held_out_keys, question_key
from cz_jax.tasks.sources import load_tasks

__all__ = ["LoadedTasks", "held_out_keys", "load_tasks", "question_key"]

"""Config -> Node, and the verbs of the command line as functions. The only room that names concrete classes."""

from cz_jax.build.models import convert_model, export_run
from cz_jax.build.propose import propose
from cz_jax.build.verbs import evaluate_model, judge_model, train

__all__ = ["convert_model", "evaluate_model", "export_run", "judge_model", "propose", "train"]

"""CodeZero on JAX: models that propose coding tasks, solve them, judge the answers and learn, without running any."""

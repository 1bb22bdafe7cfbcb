"""A study's file: a Python module that defines `STUDY = Study(...)`, and whose docstring states the question."""

from pathlib import Path

from eurollm_jax.ablation.study import Study
from eurollm_jax.experiment import load_constant


def load_study(path: Path) -> tuple[Study, str]:
    """The `STUDY` of a Python file, and the file's docstring. Raises UserError as `load_experiment` does."""
    return load_constant(path, "STUDY", Study, "study", "experiments/mixture_study.py")

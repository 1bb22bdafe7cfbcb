"""The report of a study: one HTML file that says what to do, why, and how sure that is."""

from eurollm_jax.ablation.report.page import write_report

__all__ = ["write_report"]

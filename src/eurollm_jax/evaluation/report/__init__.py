"""The report of a run: one HTML file that explains itself, asks nothing of the network, and can be mailed around."""

from eurollm_jax.evaluation.report.page import final_table, write_report

__all__ = ["final_table", "write_report"]

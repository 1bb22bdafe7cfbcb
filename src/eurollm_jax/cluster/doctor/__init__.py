"""The doctor: whether this environment, and every process of a job alike, is what a training run needs.

The command's own process checks what needs no jax. All else happens in a child of it (probe.py), since a plug-in may
fail at its import, abort its process or never answer, and none of that may keep the findings from being told.
"""

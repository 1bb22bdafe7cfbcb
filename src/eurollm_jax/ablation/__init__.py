"""Ablation of mixtures: a study designs small runs, trains them, fits laws to them, and proposes shares or declines."""

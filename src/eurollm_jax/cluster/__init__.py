"""What stands between an experiment and a machine: sites, plans, job scripts, and the doctor."""

"""Plan: what an experiment would take of a machine, from its train step compiled here for a mesh that is not here."""

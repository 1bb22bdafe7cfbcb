"""Job scripts: from a run, a study or a corpus to what a site's scheduler is given, and what becomes of it there."""

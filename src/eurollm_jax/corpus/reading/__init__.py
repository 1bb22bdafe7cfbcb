"""Files of many kinds -> `Document`s, each with its language, corpus and licence."""

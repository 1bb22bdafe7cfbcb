"""Documents -> token store: the work cut into units, done anywhere, merged once."""

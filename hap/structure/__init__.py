"""Which rows of a model feed which slots, and the groups of rows that share one fate."""

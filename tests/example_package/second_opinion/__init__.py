"""A worked example: a score that a stranger brings, in a package of its own."""

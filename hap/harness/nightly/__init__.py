"""Series of nights: what is measured anew, and what got worse."""

"""Who feeds whom: which rows of a model write which slots, and the groups that go together."""

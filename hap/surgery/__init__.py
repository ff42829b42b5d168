"""A plan carried out: the physically smaller model, and the masked model that it must equal."""

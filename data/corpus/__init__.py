"""Documents: from text to a token store, and from a store to pretraining samples."""

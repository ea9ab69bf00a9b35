"""The route of text-generation-inference: fields, checks, answers."""

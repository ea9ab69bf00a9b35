"""Tools that a model may call: what requests say of them, how prompts and answers spell calls."""

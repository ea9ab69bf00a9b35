"""Text to tokens to samples, and tokenizers; NumPy only, never paddle."""

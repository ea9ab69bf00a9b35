"""The kinds of tokenizer behind `data.tokenizer.load_tokenizer`."""

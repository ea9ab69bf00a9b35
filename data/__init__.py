"""Text to tokens to samples, and tokenizers; NumPy only, never paddle.

- tokenizer: `load_tokenizer`, the door to tokenization/; vocabulary: does it belong to a model;
- corpus/: text to token stores and samples for pretraining;
- conversations/: instruction data and preference pairs to samples for finetuning;
- order: which samples are taken and when; assets/: samples and a tokenizer that ship;
- prepare, arguments: the command `python -m data.prepare`.
"""

"""The kinds of tokenizer behind `data.tokenizer.load_tokenizer`.

- base: what all can do; sentencepiece_model, tiktoken_file, hf_json: by the kind of file;
- model_files: what lies beside it in a model directory; chat: templates;
- stream: ids to text one by one; batch, packed, bulk: many texts fast; training: a new one.
"""

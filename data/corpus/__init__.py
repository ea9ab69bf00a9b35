"""Documents: from text to a token store, and from a store to pretraining samples.

- readers: documents of a file; prepare_worker: pieces to ids; prepare_job: all of it, resumably;
- token_store_writer, token_store: ids on disk;
- pretrain_dataset: a store as samples of one length;
- stdlib_corpus: text that every machine has, to try things with.
"""

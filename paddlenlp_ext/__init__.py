"""PaddleNLP's Trainer, extended: the only package that imports paddlenlp.

What a run needs before training starts is in ``llm.train``, which loads neither paddle nor
paddlenlp before input has been checked, so bad input is refused within a second.
"""

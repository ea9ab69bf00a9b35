"""PaddleNLP's Trainer, extended: the only package that imports paddlenlp.

What a script needs before training starts (``preflight``, ``checkpoints``, ``schedules``) loads
neither paddle nor paddlenlp, so bad input is refused within a second.
"""

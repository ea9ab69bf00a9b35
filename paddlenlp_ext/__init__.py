"""PaddleNLP's Trainer, extended: only what imports paddlenlp. All else of training: llm/train."""

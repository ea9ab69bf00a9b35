"""What training takes besides the trainer; nothing here imports paddlenlp."""

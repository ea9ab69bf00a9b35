"""What clients of PaddleNLP's flask server send: fields, checks, answers."""

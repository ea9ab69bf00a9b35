"""The routes that show what text is to the model: fields, answers."""

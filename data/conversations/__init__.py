"""Prompts, answers and preferences: from files of any format to what is learnt of them."""

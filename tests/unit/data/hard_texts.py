"""Texts that are hard to tokenize."""

import random

# Characters at which tokenizers and cut rules go wrong: every kind of white space, sentencepiece's
# own space sign, controls, combining marks, digits of other scripts, control tokens' texts.
HARD_CHARACTERS = [
    *("a", "b", "the", "Th", "word", "x1", "1", "12345", "''", "'s", "'S", "don't", "_"),
    *(" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r", "\t", "\x0b", "\x0c"),
    *("\u2581", "\u3000", "\xa0", "\x85", "\x1c", "\x1f", "\u2028", "\u2029", "\u200b", "\u180e"),
    *(".", ",", "!!", "...", "(", "</", "<unk>", "<s>", "</s>", "<|eot_id|>", "<|begin_of_text|>"),
    *(
        "中文",
        "你好，世界。",
        "日本語",
        "한국어",
        "é",
        "e\u0301",
        "ß",
        "ſ",
        "İ",
        "ﬁ",
        "½",
        "Ⅳ",
        "٣",
    ),
    *("😀", "👨‍👩‍👧", "🇩🇪", "\U000e0001", "\U0010ffff", "\ufeff", "\ufffd", "\x01", "\x7f", "\x00"),
]


def hard_texts(count: int, seed: int = 0) -> list[str]:
    """Random texts of hard characters and of any others."""
    rng = random.Random(seed)

    def any_character() -> str:
        first, last = rng.choice([(0x20, 0x7F), (0, 0x20), (0x80, 0xD7FF), (0xE000, 0x10FFFF)])
        return chr(rng.randint(first, last))

    texts = ["", " ", "  ", "   ", "\n", " \n", "\n ", "\u2581", " \u2581", "\u2581 ", "a ", " a"]
    for index in range(count):
        choose = any_character if index % 4 == 0 else lambda: rng.choice(HARD_CHARACTERS)
        texts.append("".join(choose() for _ in range(rng.randrange(24))))
    return texts

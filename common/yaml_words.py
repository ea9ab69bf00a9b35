"""YAML whose values are the words that stand there, as on a command line.

YAML 1.1 reads `no` as false, `010` as 8, `12:30` as 750 and `1e-5` as text. Here the field that a
value is for decides what it is; null alone is known by its spelling (null, ~, nothing).
"""

from typing import Any

import yaml


class _Words(yaml.SafeLoader):
    """A safe loader of words, in whose mappings a key stands once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_KNOWN = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_Words.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KNOWN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_words(text: str) -> object:
    """The content of a YAML document, every scalar a string or None.

    Raises:
        yaml.YAMLError: it is none, or a key stands twice.
    """
    content: object = yaml.load(text, Loader=_Words)
    return content

"""YAML for people: the rules of YAML 1.2's core schema (yes, 010 and 1:30 are no surprises), no key twice, and nothing
that a small file can make endless.

Numbers, truth values, null, text, lists and mappings with keys of text. Aliases and merge keys (`<<`) are copies:
whatever they stand for counts.
"""

import re
from typing import Any

import yaml

MOST_BYTES = 1 << 18
_MOST_VALUES, _DEEPEST, _LONGEST_NUMBER = 10_000, 40, 40
_TAG = "tag:yaml.org,2002:"
_TRUE, _FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
_BOOL = re.compile(rf"({'|'.join((*_TRUE, *_FALSE))})\Z")
_INT = re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z")
_SCALARS = (  # each with the characters that it begins with
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)


class _Composer(yaml.SafeLoader):
    """Nodes with their tags; `sizes` counts what each anchor stands for, with what its own aliases stand for."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (a table of the class, as PyYAML has it)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0
        self.sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        anchor: str | None = getattr(event, "anchor", None)
        if self.check_event(yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self.sizes:
                raise _mistake("an alias stands for a value that holds it", event)
            self._count(self.sizes.get(anchor or "", 0), event)
            return super().compose_node(parent, index)
        before, self.depth = self.values, self.depth + 1
        if self.depth > _DEEPEST:
            raise _mistake(f"values are nested deeper than {_DEEPEST}", event)
        self._count(1, event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if anchor is not None:
            self.sizes[anchor] = self.values - before
        return node

    def _count(self, values: int, event: Any) -> None:
        self.values += values
        if self.values > _MOST_VALUES:
            raise _mistake(f"there are more than {_MOST_VALUES:,} values, aliases counted as their values", event)


for _name, _pattern, _first in _SCALARS:
    _Composer.add_implicit_resolver(_TAG + _name, _pattern, _first)


def read_yaml(text: str) -> Any:
    """The value of one document; every alias is a value of its own. Raises yaml.YAMLError."""
    composer = _Composer(text)
    try:
        node = composer.get_single_node()
        return None if node is None else _value(node)
    finally:
        composer.dispose()


def _value(node: yaml.Node) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, kind)
    raise _mistake(f"the tag {node.tag} is not one that is read here", node)


def _mapping(node: yaml.MappingNode) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: list[dict[str, Any]] = []
    for key_node, value_node in node.value:
        key = _value(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise _mistake("a key is not text", key_node)
        if key in own or (key == "<<" and merged):
            raise _mistake(f"the key {key} stands here a second time: join the two, or the first is lost", key_node)
        value = _value(value_node)
        if key == "<<":
            merged = value if isinstance(value, list) else [value]
            if not merged or not all(isinstance(one, dict) for one in merged):
                raise _mistake("<< takes a mapping or a list of mappings", value_node)
        else:
            own[key] = value
    return {**{key: value for one in reversed(merged) for key, value in one.items()}, **own}


def _scalar(node: yaml.ScalarNode, kind: str) -> Any:
    text = node.value
    if kind == "str":
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON's way to write letters beyond 16 bits
        except UnicodeDecodeError:
            raise _mistake("a text holds half a character (a lone surrogate)", node) from None
    if len(text) > _LONGEST_NUMBER:
        raise _mistake(f"a number has more than {_LONGEST_NUMBER} characters", node)
    if kind == "null" and _NULL.match(text):
        return None
    if kind == "bool" and _BOOL.match(text):
        return text in _TRUE
    if kind == "int" and _INT.match(text):
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)
    if kind == "float" and _FLOAT.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise _mistake(f"{text[:40]!r} does not fit its tag {node.tag}", node)


def _mistake(text: str, where: Any) -> yaml.YAMLError:
    mark = where.start_mark
    return yaml.YAMLError(f"line {mark.line + 1}, column {mark.column + 1}: {text}")


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would take for something else than text."""


for _name, _pattern, _first in _SCALARS:
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def write_yaml(content: Any, allow_unicode: bool = False) -> str:
    """Text that `read_yaml` reads back as `content`, and so does YAML 1.1."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=allow_unicode)

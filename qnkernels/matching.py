"""Options that differ from layer to layer: one integer, or a table by name fragment or attribute."""

from collections.abc import Mapping

from torch import nn

from .ops.checks import fail

Option = int | Mapping

ANY = "*"
BY_NAME = "fuzzy_name"


def resolve(argument: str, option: Option, name: str, layer: nn.Module) -> object:
    """The value of an option for a layer.

    option: a value for all layers; {"fc": 8, "attn": 4, "*": 8}, the first fragment that the layer's name
    contains, "*" for names without any; or, as in fairseq's configurations, by class of the plain layer,
    {"Linear": {"key": "in_features", "value": {512: 8, "*": 4}}}: by the value of the attribute `key`, or,
    with "fuzzy_name" for a key, by name fragment. Raises ValueError where a table has none for the layer.
    """
    if not isinstance(option, Mapping):
        return option
    if not any(isinstance(value, (Mapping, list, tuple)) for value in option.values()):
        return _by_name(argument, option, name)
    kind = getattr(layer, "PLAIN", type(layer)).__name__
    if kind not in option:
        fail(argument, f"an entry for {kind} layers", f"entries for {', '.join(map(str, option))}")
    key, table = _rule(argument, option[kind])
    if key == BY_NAME:
        return _by_name(argument, table, name)
    if not hasattr(layer, key):
        fail(argument, f"an attribute of {kind} layers or {BY_NAME!r} as key", repr(key))
    return _by_attribute(argument, table, key, getattr(layer, key))


def _rule(argument: str, rule: object) -> tuple[str, Mapping]:
    if isinstance(rule, Mapping) and rule.keys() == {"key", "value"}:
        rule = rule["key"], rule["value"]
    if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[1], Mapping):
        fail(argument, "a key and a table of values for each class of layers", repr(rule))
    return str(rule[0]), rule[1]


def _by_name(argument: str, table: Mapping, name: str) -> object:
    for fragment, value in table.items():
        if fragment != ANY and str(fragment) in name:
            return value
    if ANY not in table:
        fail(argument, f"a fragment of the name {name!r}, or {ANY!r}", repr(list(table)))
    return table[ANY]


def _by_attribute(argument: str, table: Mapping, key: str, attribute: object) -> object:
    """Compared as text without spaces: a kernel_size is written (3, 3) or (3,3)."""
    wanted = _text(attribute)
    for value, result in table.items():
        if _text(value) == wanted:
            return result
    if ANY not in table:
        fail(argument, f"a value for {key}={attribute}, or {ANY!r}", repr(list(table)))
    return table[ANY]


def _text(value: object) -> str:
    return str(value).replace(" ", "")

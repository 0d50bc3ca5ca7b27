"""Schemas and regular expressions for tests, as hypothesis makes them."""

from typing import Any

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "name", "size", "é", 'quo"ted', "x y"])
TEXTS = st.text(st.sampled_from('abc "\\/é😀\n'), max_size=6)
VALUES = st.one_of(TEXTS, st.integers(-1000, 1000), st.booleans(), st.none())


@st.composite
def strings(draw: st.DrawFn) -> dict[str, Any]:
    """A schema of strings."""
    least = draw(st.integers(0, 5))
    fields: dict[str, Any] = {"minLength": least, "maxLength": least + draw(st.integers(0, 12))}
    pattern = draw(st.sampled_from([None, "^[a-f]{2,9}$", "^(x|yy)+$", "[0-9]", r"^\d{3}-\w+$"]))
    return {"type": "string", **draw(st.sampled_from([{}, fields, {"pattern": pattern} if pattern else {}]))}


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    """A schema of numbers."""
    least = draw(st.integers(-300, 300))
    most = least + draw(st.integers(0, 500))
    bounds = draw(st.sampled_from([{}, {"minimum": least}, {"minimum": least, "maximum": most}]))
    return {"type": draw(st.sampled_from(["integer", "number"])), **bounds}


def fixed() -> st.SearchStrategy[dict[str, Any]]:
    """A schema of given values."""
    several = st.lists(VALUES, min_size=1, max_size=5).map(lambda values: {"enum": values})
    return st.one_of(several, VALUES.map(lambda value: {"const": value}))


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    """A schema of values without parts."""
    plain = st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}])
    return st.one_of(strings(), numbers(), fixed(), plain)


@st.composite
def arrays(draw: st.DrawFn, items: st.SearchStrategy[Any]) -> dict[str, Any]:
    """A schema of arrays."""
    least = draw(st.integers(0, 3))
    fields: dict[str, Any] = {"type": "array", "items": draw(items)}
    if draw(st.booleans()):
        fields["prefixItems"] = [draw(items)]
    return {**fields, "minItems": least, "maxItems": least + draw(st.integers(1, 3))}


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    """A schema of objects."""
    properties = draw(st.dictionaries(NAMES, values, max_size=4))
    required = [name for name in properties if draw(st.booleans())]
    extra = draw(st.sampled_from([False, False, {"type": "integer"}]))
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": extra}


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """A small JSON schema of what llguidance enforces."""
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            arrays(inner), objects(inner), st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
        ),
        max_leaves=6,
    )


ATOMS = st.sampled_from(["a", "b", "é", " ", r"\.", "[a-f]", "[^x]", r"\d", r"\w", ".", "[0-9_-]", "/", '"', "ab"])
QUANTIFIERS = st.sampled_from(["", "", "?", "*", "+", "{2}", "{1,4}", "{3,}"])


@st.composite
def regexes(draw: st.DrawFn) -> str:
    """A regular expression that means the same in Rust and in Python; repeated parts repeat nothing themselves."""
    alternatives = [
        "".join(draw(pieces()) for _ in range(draw(st.integers(1, 4)))) for _ in range(draw(st.integers(1, 3)))
    ]
    return "|".join(alternatives)


@st.composite
def pieces(draw: st.DrawFn) -> str:
    """A part of a regular expression that may be repeated."""
    atom = draw(ATOMS)
    if draw(st.integers(0, 3)) == 0:
        atom = f"({'|'.join(draw(st.lists(ATOMS, min_size=1, max_size=3)))})"
    elif len(atom) == 2 and atom[0] != "\\":
        atom = f"(?:{atom})"
    return atom + draw(QUANTIFIERS)

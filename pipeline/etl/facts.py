"""A WebDataset sample's JSON and key → its row of the label table, in our own layout or with CheXpert's columns."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.base.errors import DataError
from pipeline.base.files import parse_object
from pipeline.labels import LABELS

_IDENTITY = re.compile(r"(patient\d+)[_/]study(\d+)[_/](view\d+_(?:frontal|lateral))", re.ASCII)
_DIGITS = {"patient": 20, "study": 6, "view": 4}  # at most; `pipeline.labels` takes as many
_IDENTITY_FIELDS = ("key", "Path", "url", "caption")  # of a JSON; img2dataset writes key, url and caption
_CSV_NAMES = {"view": "Frontal/Lateral", "sex": "Sex", "age": "Age", "projection": "AP/PA"}
# What each value of a JSON must look like as text; null, NaN and "" are the empty text, and become null. Half a
# surrogate pair, which JSON can spell, is no text: neither Arrow nor UTF-8 can hold it.
_WORD, _TEXT = r"[^\s\ud800-\udfff]+", r"[^\n\ud800-\udfff]*"
_PATTERNS = {
    "key": _WORD,
    "patient": _WORD,
    "study": r"[0-9]{1,9}",
    "view": r"frontal|lateral|other",
    "sex": _TEXT,
    "age": r"([0-9]{1,3}(\.0)?)?",
    "projection": _TEXT,
    **dict.fromkeys(LABELS, r"((-2|-1|0|1)(\.0)?)?"),
}
_LIMITS = {"study": ", not a number of up to 9 digits", "age": ", not a number of up to 3 digits"}
_NUMBERS = ("study", "age", *LABELS)


def read_facts(data: bytes, sample_key: str) -> dict[str, Any]:
    """A sample's row, with the columns `pipeline.manifest.FACTS`. Raises ValueError saying what is wrong."""
    document = _parse(data)
    labels = document.get("labels")
    values = document | labels if isinstance(labels, dict) else _flat_values(document, sample_key)
    row = {}
    for name, pattern in _PATTERNS.items():
        if name not in values:
            raise ValueError(f"its JSON lacks {name}")
        value = values[name]
        text = "" if value is None or value != value else str(value)
        if not re.fullmatch(pattern, text):
            raise ValueError(f"its JSON holds {value!r:.100} as {name}{_LIMITS.get(name, '')}")
        row[name] = None if not text else int(float(text)) if name in _NUMBERS else text
    return row


def read_identity(data: bytes, sample_key: str) -> dict[str, Any]:
    """A sample's key, patient and study in CheXpert. Raises ValueError where neither key nor JSON tells them."""
    # The JSON may be about anything where the key says enough.
    return _find_identity({} if _IDENTITY.search(sample_key) else _parse(data), sample_key)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        return parse_object("its JSON", data)
    except DataError as error:
        raise ValueError(str(error)) from None


def _flat_values(document: Mapping[str, Any], sample_key: str) -> dict[str, Any]:
    """A JSON with the columns of CheXpert's CSV, under the table's names."""
    values = {name.replace("_", " "): value for name, value in document.items()}
    if not any(label in values for label in LABELS):
        raise ValueError("no labels in its JSON; give them by `csv`")
    values |= {name: values[column] for name, column in _CSV_NAMES.items() if column in values}
    values |= _find_identity(document, sample_key)
    return values | {"view": str(values.get("view")).lower()}


def _find_identity(document: Mapping[str, Any], sample_key: str) -> dict[str, str]:
    """key, patient and study, from the sample's key or a field of its JSON. Raises ValueError."""
    for text in (sample_key, *map(document.get, _IDENTITY_FIELDS)):
        if isinstance(text, str) and (match := _IDENTITY.search(text)):
            patient, study, view = match.groups()
            for number, (what, digits) in zip(re.findall(r"\d+", match[0]), _DIGITS.items(), strict=True):
                if len(number) > digits:
                    raise ValueError(f"{match[0]:.200}: {what} numbers have up to {digits} digits here")
            return {"key": f"{patient}_study{study}_{view}", "patient": patient, "study": study}
    fields = ", ".join(_IDENTITY_FIELDS)
    raise ValueError(f"no patientN_studyN_viewN_frontal in its key, nor in {fields} of its JSON")

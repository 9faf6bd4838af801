"""The JSON Schema of stored results, exported to `results/schema.json` for readers in other languages.

`python -m lra.results.json_schema` writes the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from lra.files import atomic
from lra.results import result
from lra.results.profile import FailedProfile, Profile
from lra.results.recall import RecallRecord
from lra.results.record import RunRecord

FILE = "schema.json"


def json_schema() -> dict[str, Any]:
    """A schema that every kind of stored result matches; each kind is also under its name in `$defs`."""
    kinds, components = msgspec.json.schema_components(
        (RunRecord, Profile, FailedProfile, RecallRecord), ref_template="#/$defs/{name}"
    )
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Results of the Long Range Arena suite",
        "description": "RunRecord: files in results/runs/, results/diagnostics/ and results/language/. Profile, "
        "FailedProfile: files in results/profile/. RecallRecord: files in results/recall/.",
        "anyOf": list(kinds),
        "$defs": components,
    }
    return json.loads(json.dumps(schema))


def write(root: Path) -> Path:
    """Write the schema into a results folder. Returns its path."""
    path = root / FILE
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(json_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(f"wrote {write(result.folder())}")

"""The Parquet files that tables are kept in: rows, and a JSON header of ours beside them.

A latency table's file holds sections, each with a header of its own; the column `section` says whose a row is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwsearch.errors import IncompatibleTables, InvalidInput
from hwsearch.files import write_bytes

KEY = b"hwsearch"
KIND = "latency_table"
SECTION = "section"


def write_parquet(table: Any, header: Mapping[str, Any], path: str | Path) -> None:
    """A pyarrow table with our header, put in place in one step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: json.dumps(header).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes())


def read_parquet(path: str | Path, kind: str, *schemas: int) -> tuple[Any, dict[str, Any]]:
    """(pyarrow table, our header). schemas: those that can be read. Raises InvalidInput or IncompatibleTables."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise InvalidInput(f"{path} does not exist; expected a {kind.replace('_', ' ')} file")
    try:
        table = pq.read_table(path)
        raw = (table.schema.metadata or {}).get(KEY)
        header = json.loads(raw) if raw is not None else None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InvalidInput(
            f"{path} is not a readable Parquet file (truncated?): {str(error).splitlines()[0]}; "
            "take another copy, or move it away and make it again"
        ) from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else "none of hwsearch's"
        raise InvalidInput(f"{path} is not a {kind.replace('_', ' ')} of hwsearch (found: {found})")
    if header.get("schema") not in schemas:
        raise IncompatibleTables(
            f"{path} has schema {header.get('schema')}, this hwsearch reads schema {', '.join(map(str, schemas))}; "
            "move it away and make it again, or use the hwsearch that wrote it"
        )
    return table, header


def read_sections(
    path: str | Path, schemas: Sequence[int], whole: Sequence[int] = ()
) -> list[tuple[dict[str, Any], Any]]:
    """(header, rows as a pyarrow table) of each section of a latency table's file.

    schemas: those that can be read. whole: older ones, whose files are one section.
    Raises InvalidInput (absent, truncated, foreign, damaged) or IncompatibleTables (another schema).
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    table, header = read_parquet(path, KIND, *schemas, *whole)
    if header["schema"] in whole:
        return [(header, table)]
    sections = header.get("sections")
    if not isinstance(sections, list) or not sections or not all(isinstance(s, dict) for s in sections):
        raise InvalidInput(f"{path} is damaged: its header names no sections; take another copy")
    if SECTION not in table.schema.names or not pa.types.is_integer(table.schema.field(SECTION).type):
        raise InvalidInput(f"{path} is damaged: its rows do not say which section they are of; take another copy")
    column = table[SECTION]
    found = [table.filter(pc.equal(column, n)).drop_columns([SECTION]) for n in range(len(sections))]
    if sum(map(len, found)) != len(table):
        raise InvalidInput(f"{path} is damaged: it has rows of none of its {len(sections)} sections; take another copy")
    return list(zip(sections, found, strict=True))


def write_sections(
    path: str | Path, sections: Sequence[tuple[Mapping[str, Any], Any]], schema: int, columns: Any
) -> None:
    """All sections of a latency table's file, put in place in one step: a killed writer leaves the old file.

    columns: pyarrow schema of the rows; what an older section lacks of it becomes null.
    """
    import pyarrow as pa

    pieces = []
    for number, (_, rows) in enumerate(sections):
        own = [rows[c.name] if c.name in rows.schema.names else pa.nulls(len(rows), c.type) for c in columns]
        numbers = pa.array([number] * len(rows), pa.int32())
        pieces.append(pa.table([numbers, *own], schema=pa.schema([(SECTION, pa.int32()), *columns])))
    header = {"schema": schema, "kind": KIND, "sections": [dict(own) for own, _ in sections]}
    write_parquet(pa.concat_tables(pieces), header, path)

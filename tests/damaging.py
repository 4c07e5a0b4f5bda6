"""Files of latency tables as no hwsearch would write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hwsearch.table.parquet import KEY


def rewrite(
    path: Path, change: Callable[[dict[str, Any]], None], rows: Callable[[pa.Table], pa.Table] = lambda t: t
) -> None:
    """Change the header and the rows of a file in place."""
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[KEY])
    change(header)
    pq.write_table(rows(table).replace_schema_metadata({KEY: json.dumps(header).encode()}), path)


def column(name: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    """One value in all rows of a column."""

    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(name)
        return table.set_column(
            index, table.schema.field(name), pa.array([value] * len(table), table.schema.field(name).type)
        )

    return change


def numbered(values: Callable[[list[int]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    """Other numbers of sections."""

    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index("section")
        return table.set_column(index, "section", pa.array(values(table["section"].to_pylist())))

    return change

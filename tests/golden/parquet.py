"""A small Parquet file of conversations, as data sets on the hub have them.

    python tests/golden/parquet.py tests/golden/messages.parquet
"""

import sys

import pyarrow as pa
import pyarrow.parquet as pq

rows = [
    {"id": i, "score": i / 4, "tools": None,
     "messages": [{"role": "user", "content": f"Tell me of cat {i}.", "name": None},
                  {"role": "assistant", "content": "Once there was a café. 🐈", "name": None}]}
    for i in range(5)
]
pq.write_table(pa.Table.from_pylist(rows), sys.argv[1], compression="zstd", row_group_size=2)

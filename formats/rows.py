# SPDX-License-Identifier: MIT
"""Data files other than JSON, as records: CSV, Parquet, and files of datasets on the Hugging Face hub.

AlpacaFarm's data (paper, section 2.1) is JSON, which data.py reads by itself; most of what is published today is Parquet.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

HUB_FILE = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?/([^@]+)")


def parse_csv(path: Path, text: str) -> list[dict]:
    """A record a row, named by the first; numbers stay texts but for the field preference. Raises ValueError naming the row."""
    csv.field_size_limit(2**31 - 1)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: no CSV ({error})") from None
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{path}: record {i}: has {'more' if None in row else 'fewer'} fields than the first row names")
        if row.get("preference") in ("", "0", "1", "2", "1.0", "1.5", "2.0"):
            row["preference"] = float(row["preference"]) if row["preference"] else None
    return rows


def parse_parquet(path: Path) -> list[dict]:
    """All rows. Raises ValueError where pyarrow is missing or the file is none."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: no Parquet file, or a damaged one ({str(error).splitlines()[0]})") from None


def fetch(name: str) -> Path:
    """A file of a dataset on the hub, hf://datasets/org/name/path (org/name@revision), from its cache where there is no network.
    Raises FileNotFoundError."""
    found = HUB_FILE.fullmatch(name)
    if not found:
        raise FileNotFoundError(f"{name}: must be hf://datasets/org/name/path/to/file")
    from huggingface_hub import hf_hub_download

    repository, revision, file = found.groups()
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", revision=revision))
    except Exception as error:  # its own kinds, httpx's and the operating system's
        raise FileNotFoundError(f"{name}: the hub gave no such file ({type(error).__name__}: "
                                f"{(str(error) or '-').splitlines()[0]})") from error

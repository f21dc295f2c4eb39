"""Numbers by key in a JSON file: a benchmark that is begun again goes on."""

import json
import time
from pathlib import Path
from typing import Any


class Results:
    """Numbers by key, in a file that is written anew after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows[key] = row
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.rows, indent=0))
        part.replace(self._path)
        print(f"{time.strftime('%H:%M:%S')} {key} {row}", flush=True)

"""One store of each kind: what all of them promise is tested with all of them."""

from pathlib import Path

import pytest

from fleetpress.storage.store import ObjectStore, open_store
from fleetpress.storage.uri import join


@pytest.fixture(params=["folder", "moto", "seaweedfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    fixture = {"moto": "s3_uri", "seaweedfs": "seaweed_uri"}.get(request.param)
    return str(request.getfixturevalue(fixture)) if fixture else str(tmp_path / "not-yet-there")


@pytest.fixture
def any_store(place: str) -> ObjectStore:
    return open_store(join(place, "root"))

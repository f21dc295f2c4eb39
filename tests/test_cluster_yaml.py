"""cluster.yaml against Ray's own validation, the EC2 API's shapes, and the rules that keep it cheap and closed."""

import copy
import re
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from ray.autoscaler._private.util import (  # private: ray is pinned for the tests
    prepare_config,
    validate_config,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def written() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def config(written: dict[str, Any]) -> dict[str, Any]:
    return prepare_config(written)


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    validate_config(config)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout",), 5),
        (("available_node_types", "worker", "min_worker"), 1),
        (("available_node_types", "worker", "max_workers"), "many"),
        (("docker", "images"), "ray"),
    ],
    ids=lambda part: ".".join(part) if isinstance(part, tuple) else None,
)
def test_ray_refuses_mistakes(written: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    """The validation above is worth something: it sees what a hand that edits the file gets wrong."""
    broken = copy.deepcopy(written)
    place = broken
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValidationError):
        validate_config(prepare_config(broken))


def ec2_problems(node_config: dict[str, Any]) -> str:
    run_instances = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances")
    request = {"ImageId": "ami-0", "MinCount": 1, "MaxCount": 1} | node_config
    return ParamValidator().validate(request, run_instances.input_shape).generate_report()


def test_ec2_knows_every_launch_option(config: dict[str, Any]) -> None:
    for name, node_type in config["available_node_types"].items():
        assert not ec2_problems(node_type["node_config"]), name
    assert "MarketTyp" in ec2_problems({"InstanceMarketOptions": {"MarketTyp": "spot"}})


def test_the_head_takes_no_work_and_workers_are_spot_machines_from_zero(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert types
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_nodes_run_the_ray_that_the_tests_ran(config: dict[str, Any]) -> None:
    pin = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert config["docker"]["image"].split(":")[1].startswith(f"{pin[1]}-py3")


def test_strangers_stay_out(config: dict[str, Any]) -> None:
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    start = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start
    assert "0.0.0.0" not in start

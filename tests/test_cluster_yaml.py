"""cluster.yaml against Ray's own validation, the EC2 API's shapes, and the rules that keep it cheap and closed."""

import copy
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
import yaml
from botocore.exceptions import ParamValidationError
from botocore.validate import ParamValidator
from jsonschema import ValidationError
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws  # private: ray is pinned for the tests
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.loader import load_function_or_class
from ray.autoscaler._private.node_provider_availability_tracker import NodeProviderAvailabilityTracker
from ray.autoscaler._private.resource_demand_scheduler import get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.node_launch_exception import NodeLaunchException

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
        (("available_node_types", "worker_spot", "min_worker"), 1),
        (("available_node_types", "worker_spot", "max_workers"), "many"),
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


def test_the_head_takes_no_work_and_workers_come_from_zero(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert types.keys() == {"worker_spot", "worker_on_demand"}
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config["max_workers"]
    spot, on_demand = types["worker_spot"]["node_config"], types["worker_on_demand"]["node_config"]
    assert spot == on_demand | {"InstanceMarketOptions": {"MarketType": "spot"}}


def test_one_line_names_the_region() -> None:
    region = re.compile(r"\b[a-z]{2}-[a-z]+-\d\b")
    assert len(region.findall((ROOT / "cluster.yaml").read_text())) == 1


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An EC2 and IAM in memory that know the roles which cluster.yaml names; and the home of who uses them."""
    with mock_aws(config={"core": {"mock_credentials": False}}):
        iam = boto3.client("iam", aws_access_key_id="moto", aws_secret_access_key="moto")
        for name in ("fleetpress-head", "fleetpress-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
            iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        yield tmp_path_factory.mktemp("home")


@pytest.fixture
def aws(cloud: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way to them."""
    show_the_way(cloud, monkeypatch)


def show_the_way(cloud: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HOME", str(cloud))  # Ray keeps the key pair there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "moto")


@pytest.fixture(scope="module")
def completed(cloud: Path) -> dict[str, Any]:
    """The configuration as Ray's AWS code completes it for a cluster when `ray up` begins."""
    with pytest.MonkeyPatch.context() as patch:
        show_the_way(cloud, patch)
        config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
        found: dict[str, Any] = bootstrap_aws(AWSNodeProvider.fillout_available_node_types_resources(config))
        return found


def provider_of(config: dict[str, Any]) -> AWSNodeProvider:
    return AWSNodeProvider(config["provider"], config["cluster_name"])


def started(provider: AWSNodeProvider, config: dict[str, Any], node_type: str) -> dict[str, dict[str, Any]]:
    """The machines that Ray's AWS code starts for a node type, by id, as EC2 describes them."""
    node_config = config["available_node_types"][node_type]["node_config"]
    ids = list(provider.create_node(node_config, {"ray-node-type": "worker"}, 1) or {})
    ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
    (reservation,) = ec2.describe_instances(InstanceIds=ids)["Reservations"]
    return {machine["InstanceId"]: machine for machine in reservation["Instances"]}


@pytest.mark.usefixtures("aws")
def test_ray_starts_and_ends_its_machines(completed: dict[str, Any]) -> None:
    provider, config = provider_of(completed), copy.deepcopy(completed)
    types = config["available_node_types"]
    assert types["worker_spot"]["resources"].items() >= {"CPU": 8}.items()
    for name, profile in (("head", "head"), ("worker_spot", "worker"), ("worker_on_demand", "worker")):
        ((machine_id, machine),) = started(provider, config, name).items()
        assert machine["InstanceType"] == types[name]["node_config"]["InstanceType"]
        assert machine["IamInstanceProfile"]["Arn"].endswith(f"fleetpress-{profile}")
        assert machine.get("InstanceLifecycle") == ("spot" if name == "worker_spot" else None)
        assert machine["SubnetId"]
        provider.terminate_nodes([machine_id])
    assert provider.non_terminated_nodes({}) == []


@pytest.mark.usefixtures("aws")
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"InstanceTyp": "m6i.large"}, "InstanceTyp"),
        ({"IamInstanceProfile": {"Name": "fleetpres-worker"}}, "fleetpres-worker|Invalid IAM"),
    ],
    ids=["a misspelt option", "a role that does not exist"],
)
def test_a_mistake_in_node_config_starts_nothing(
    completed: dict[str, Any], option: dict[str, Any], message: str
) -> None:
    provider, config = provider_of(completed), copy.deepcopy(completed)
    config["available_node_types"]["worker_spot"]["node_config"] |= option
    with pytest.raises((ParamValidationError, NodeLaunchException), match=message):
        started(provider, config, "worker_spot")


@pytest.mark.usefixtures("aws")
def test_on_demand_machines_come_while_there_are_no_spot_machines(completed: dict[str, Any]) -> None:
    config = copy.deepcopy(completed)
    (scorer,) = re.findall(
        r"-e RAY_AUTOSCALER_UTILIZATION_SCORER=(\S+)", "\n".join(config["docker"]["run_options"])
    )
    now = 1000.0
    seen = NodeProviderAvailabilityTracker(timer=lambda: now)

    def wanted() -> dict[str, int]:
        """What the autoscaler would start for five tasks of two CPUs: they fill one machine and a part of another."""
        score = partial(load_function_or_class(scorer), node_availability_summary=seen.summary())
        types, head = config["available_node_types"], config["head_node_type"]
        return dict(get_nodes_for(types, {head: 1}, head, 8, [{"CPU": 2}] * 5, score)[0])

    assert wanted() == {"worker_spot": 2}
    seen.update_node_availability(
        "worker_spot", 1000, NodeLaunchException("InsufficientInstanceCapacity", "", None)
    )
    assert wanted() == {"worker_on_demand": 2}
    now += 31 * 60
    assert wanted() == {"worker_spot": 2}


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

"""cluster.yaml is what Ray accepts, opens nothing, holds no secret, and gives a GPU enough cores; .rayignore ships code only."""

from __future__ import annotations

import re
import shutil
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.heads import ROOT

VCPU_AND_GPU = {"m7i.xlarge": (4, 0), "c7i.4xlarge": (16, 0), "g6.4xlarge": (16, 1)}
"""Of the instance types in the file, from AWS's list; a new type has to be entered here."""
TEXT = (ROOT / "cluster.yaml").read_text()


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    with pytest.raises(Exception, match="nodetypes"):
        validate_config(prepared | {"nodetypes": 1})  # the schema does look


def test_ray_adds_no_commands_of_its_own(config: dict[str, Any]) -> None:
    prepared = prepare_config(config)
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == config["setup_commands"]


def test_the_head_runs_no_work_and_is_not_spot(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])


def test_workers_are_spot_come_from_zero_and_have_cores_for_their_gpus(config: dict[str, Any]) -> None:
    assert any("GPU" in kind["resources"] for kind in workers(config).values())
    for name, kind in workers(config).items():
        vcpu, gpu = VCPU_AND_GPU[kind["node_config"]["InstanceType"]]
        assert kind["min_workers"] == 0, name
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot", name
        assert kind["resources"] == {"CPU": vcpu} | ({"GPU": gpu} if gpu else {}), name
        assert not gpu or vcpu / gpu >= 8, name
    assert config["max_workers"] >= sum(kind["max_workers"] for kind in workers(config).values())
    assert 0 < config["idle_timeout_minutes"] <= 10


def test_nothing_is_open_to_the_world(config: dict[str, Any]) -> None:
    assert not re.findall(r"0\.0\.0\.0|::/0", TEXT)
    for name, kind in config["available_node_types"].items():
        # without a group of its own a type gets the one that Ray makes, which opens SSH to everybody
        assert kind["node_config"]["SecurityGroupIds"] == ["sg-00000000000000000"], name
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required", name
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"]), name
    assert "security_group" not in config["provider"]  # rules given here would be added to Ray's own group
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])


def test_token_authentication_is_on_everywhere(config: dict[str, Any]) -> None:
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert len(starts) == 1
        assert "RAY_AUTH_MODE=token " in starts[0]
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"  # Ray's default path, there and here
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])  # for ray exec and attach


def test_no_secret_stands_in_it() -> None:
    assert not re.search(r"AKIA|ASIA|hf_\w|RAY_AUTH_TOKEN=|SECRET|PASSWORD|-----BEGIN|wandb", TEXT)
    assert not re.search(r"[A-Za-z0-9+/]{40,}", TEXT)  # nothing that looks like a key


def test_versions_are_pinned(config: dict[str, Any]) -> None:
    mounts = {local for local in config["file_mounts"].values() if not local.startswith("~")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert mounts == {"pyproject.toml", "constraints.txt", "dinoray", project["readme"], *project["license-files"]}
    assert all((ROOT / local).exists() for local in mounts)  # what an installation from these files needs
    installs = [command for command in config["setup_commands"] if "pip install" in command]
    assert installs
    for command in installs:
        assert "--constraint constraints.txt" in command or re.search(r" uv==\d+\.\d+\.\d+$", command), command


def test_a_job_ships_the_code_and_nothing_else(tmp_path: Path) -> None:
    """Ray's own packer over a checkout with data, outputs and an environment in it."""
    checkout = tmp_path / "checkout"
    for folder in ("dinoray", "jobs"):
        shutil.copytree(ROOT / folder, checkout / folder)
    for file in (".rayignore", ".gitignore", "pyproject.toml", "constraints.txt", "cluster.yaml"):
        shutil.copy(ROOT / file, checkout / file)
    for stray in ("images/a.tif", "out/features/part-1.parquet", ".venv/lib/x.py", ".git/config", "plate.csv", "weights.pth",
                  "dinoray/x.zarr/zarr.json", "jobs/big.safetensors", "tests/test_a.py", "demo_out/report.html"):
        (checkout / stray).parent.mkdir(parents=True, exist_ok=True)
        (checkout / stray).write_bytes(b"x")
    uri = get_uri_for_directory(str(checkout), include_gitignore=True)
    package = tmp_path / "package.zip"
    create_package(str(checkout), package, include_gitignore=True)
    assert uri.startswith("gcs://")
    shipped = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    code = {str(p.relative_to(ROOT)) for folder in ("dinoray", "jobs") for p in (ROOT / folder).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts}
    assert shipped == code | {"pyproject.toml", "constraints.txt", "cluster.yaml"}


def test_on_a_simulated_aws_rays_own_launcher_opens_nothing_and_rents_spot(
        config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray's bootstrap and node provider against moto, made ready as docs/cluster.md says."""
    import boto3
    from moto import mock_aws

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the SSH key that it makes in ~/.ssh
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "simulated")
    region = config["provider"]["region"]
    with mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        group = ec2.create_security_group(GroupName="dinoray", Description="test")["GroupId"]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        text = TEXT.replace("sg-00000000000000000", group).replace("ami-00000000000000000", image)
        prepared = prepare_config(yaml.safe_load(text))
        for profile in {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in prepared["available_node_types"].values()}:
            iam.create_instance_profile(InstanceProfileName=profile)
        ready = bootstrap_aws(prepared)
        assert [g["IpPermissions"] for g in ec2.describe_security_groups()["SecurityGroups"]] == [[], []]  # the default, ours
        assert iam.list_roles()["Roles"] == []  # none with full access was made
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for name, kind in ready["available_node_types"].items():
            provider.create_node(dict(kind["node_config"]), {"ray-user-node-type": name}, 1)
        found = {tag["Value"]: instance for reservation in ec2.describe_instances()["Reservations"]
                 for instance in reservation["Instances"] for tag in instance["Tags"] if tag["Key"] == "ray-user-node-type"}
        assert found.keys() == ready["available_node_types"].keys()
        for name, instance in found.items():
            assert (instance.get("InstanceLifecycle") == "spot") == (name != config["head_node_type"]), name
            assert [g["GroupId"] for g in instance["SecurityGroups"]] == [group]

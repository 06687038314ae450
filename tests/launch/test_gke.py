"""launch/gke_jobset.yaml: what Kubernetes would make of it, and two of its pods, which train here."""

import os
import re
import subprocess

import pytest
import yaml

from blip2_jax.monitoring.metrics import read_metrics
from tests import processes as together
from tests.launch import runs

FILE = runs.LAUNCH / "gke_jobset.yaml"


@pytest.fixture
def jobset() -> dict:
    return yaml.safe_load(FILE.read_text())


def job(jobset: dict) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container(jobset: dict) -> dict:
    (only,) = job(jobset)["template"]["spec"]["containers"]
    return only


def environment(jobset: dict, slice_index: int, host: int) -> dict[str, str]:
    """What a kubelet gives the container of a pod: annotations as values, and $(NAME) of those above."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    annotations = {
        "jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"],
        "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"],
        "jobset.sigs.k8s.io/replicatedjob-replicas": str(replicated["replicas"]),
        "jobset.sigs.k8s.io/job-index": str(slice_index),
        "batch.kubernetes.io/job-completion-index": str(host),
    }
    values: dict[str, str] = {}
    for variable in container(jobset)["env"]:
        if "valueFrom" in variable:
            path = variable["valueFrom"]["fieldRef"]["fieldPath"]
            values[variable["name"]] = annotations[re.fullmatch(r"metadata\.annotations\['(.+)'\]", path).group(1)]
        else:
            values[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: values[name.group(1)], variable["value"])
    return values


def command(jobset: dict) -> list[str]:
    return container(jobset)["command"] + container(jobset)["args"]


def test_what_is_restarted_and_what_not(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
        ("FailJobSet", ["PodFailurePolicy"])
    ]
    assert job(jobset)["backoffLimit"] == 0
    lost, error = job(jobset)["podFailurePolicy"]["rules"]
    assert (lost["action"], lost["onPodConditions"][0]["type"]) == ("Count", "DisruptionTarget")
    assert (error["action"], error["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    codes = error["onExitCodes"]["values"]
    assert codes == sorted(set(codes))
    assert 75 in codes
    assert not {1, 2, 130} & set(codes)
    assert all(code == 75 or code > 128 for code in codes)


def test_the_pods_can_find_each_other_and_have_time_to_save(jobset):
    pod = job(jobset)["template"]["spec"]
    assert jobset["spec"]["network"]["enableDNSHostnames"]
    assert job(jobset)["completionMode"] == "Indexed"
    assert job(jobset)["parallelism"] == job(jobset)["completions"]
    assert pod["restartPolicy"] == "Never"  # Which a podFailurePolicy requires.
    assert pod["terminationGracePeriodSeconds"] >= 120
    values = environment(jobset, 0, 0)
    assert int(values["HOSTS"]) == job(jobset)["parallelism"]
    address, _, port = values["JAX_COORDINATOR_ADDRESS"].partition(":")
    name = jobset["metadata"]["name"]
    assert address == f"{name}-{jobset['spec']['replicatedJobs'][0]['name']}-0-0.{name}"
    assert {"containerPort": int(port)} in container(jobset)["ports"]
    assert job(jobset)["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"] == container(jobset)["name"]
    mounted = {mount["name"] for mount in container(jobset)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_every_process_of_every_slice_has_a_number_of_its_own(jobset, tmp_path):
    jobset["spec"]["replicatedJobs"][0]["replicas"] = 3
    (tmp_path / "python").write_text('#!/bin/sh\necho "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES"\n')
    (tmp_path / "python").chmod(0o755)
    found = [
        subprocess.run(
            command(jobset),
            env=environment(jobset, slice_index, host) | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for slice_index in range(3)
        for host in range(4)
    ]
    assert found == [f"{number} of 12" for number in range(12)]


def test_the_command_is_main_itself_with_its_arguments(jobset, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\necho $$; for word; do echo "<$word>"; done\n')
    (tmp_path / "python").chmod(0o755)
    values = environment(jobset, 0, 1) | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "a b.py"}
    pod = subprocess.Popen(
        [*command(jobset), "--config.seed=1"], env=values, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    output = pod.communicate(timeout=30)[0].splitlines()
    workdir = values["WORKDIR"]
    assert output[0] == str(pod.pid)  # Not a child of a shell, so that SIGTERM reaches it.
    assert output[1:] == [
        "<-m>",
        "<blip2_jax.main>",
        "<--config=a b.py>",
        f"<--workdir={workdir}>",
        "<--config.seed=1>",
    ]


@pytest.mark.slow
def test_two_pods_train_one_run(jobset, folder, tmp_path):
    recipe = runs.recipe(folder, tmp_path / "recipe.py", total_steps=4)
    next(variable for variable in container(jobset)["env"] if variable["name"] == "HOSTS")["value"] = "2"
    port = together.free_port()
    pods = []
    for host in range(2):
        own = environment(jobset, 0, host) | {"CONFIG": str(recipe), "WORKDIR": str(tmp_path / "run")}
        assert own["JAX_COORDINATOR_ADDRESS"] == "blip2-slice-0-0.blip2:8476"
        own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "BLIP2_JAX_CACHE": str(folder / "cache")}
        # As in any pod of a cluster, whose service jax is not to be asked for.
        own |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        pods.append(
            subprocess.Popen(
                command(jobset),
                env=runs.environment(**own),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    ended = [runs.end(pod, 600) for pod in pods]
    assert [code for code, _ in ended] == [0, 0], "\n\n".join(output for _, output in ended)
    assert "processes: this is number 0 of 2, with 1 of 2 devices" in ended[0][1]
    assert "kubernetes" not in ended[0][1].lower()
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 4]

"""The workflows of GitHub: each job's commands run here as they are written, in a checkout of its own, on stacks of the tests'.

What stands in: tests/forge.py for GitHub's and GitLab's APIs, `Run` for GitHub's runner (expressions by a table, the three
actions that are used), and other stacks in `.ci/stacks`, as a repository with other stacks has them.
"""

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from lab.ports import free_port
from tests.engine.conftest import remove_from_daemon
from tests.engine.stack import ROOT, copy_checkout, environment_of_toolchain, remove_trust
from tests.forge import TOKEN, Forge, running_forge

WORKFLOWS = sorted(file.name for file in (ROOT / ".github/workflows").iterdir())
PASSPHRASE = "a passphrase for tests"
EXPRESSION = re.compile(r"\$\{\{ *(.*?) *\}\}")
# What GitHub knows in a pull request of this repository, and at a push.
VALUES = {
    "github.event.pull_request.head.repo.full_name == github.repository": "true",
    "github.event.pull_request.head.repo.full_name != github.repository": "",
    "github.event.pull_request.number": "7",
    "github.event.pull_request.base.sha": "main",
    "github.ref == 'refs/heads/main'": "true",
    "github.token": TOKEN,
    "!cancelled()": "true",
    "!cancelled() && needs.preview.result != 'skipped'": "true",
    "inputs.allow-data-loss": "",
    "secrets.AWS_ACCESS_KEY_ID": "",
    "secrets.AWS_SECRET_ACCESS_KEY": "",
    "secrets.KUBECONFIG": "apiVersion: v1\nkind: Config\n",
    "secrets.PULUMI_ACCESS_TOKEN": "",
    "secrets.PULUMI_CONFIG_PASSPHRASE": PASSPHRASE,
}
FROM_A_FORK = {
    "github.event.pull_request.head.repo.full_name == github.repository": "",
    "github.event.pull_request.head.repo.full_name != github.repository": "true",
    "!cancelled() && needs.preview.result != 'skipped'": "",
}


def parsed(workflow: str) -> dict[Any, Any]:
    content: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows" / workflow).read_text())
    return content


def bash(script: str, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run commands as GitHub's `shell: bash` does, and GitLab's runner where there is a bash."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


class Repository:
    """The project as somebody has it who has other stacks: their files, `.ci/stacks`, a backend, and a Docker daemon."""

    def __init__(self, folder: Path, names: list[str], api: str) -> None:
        self.folder = folder / "repository"
        self.names = names
        self.api = api
        self.runs = 0
        self.values = {**VALUES, "vars.PULUMI_BACKEND_URL": f"file://{folder}/state"}
        foreign = ("PULUMI", "MAKE", "GITHUB", "CI", "GITLAB", "STACK")
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        self.environment["NO_PROXY"] = "127.0.0.1"
        (folder / "state").mkdir()
        copy_checkout(self.folder)
        *before, last = names
        (self.folder / ".ci/stacks").write_text(f"before_production=({' '.join(before)})\nproduction={last}\n")
        for name in names:
            self._write(name, {})
            self.pulumi("stack", "init", name)

    @property
    def addresses(self) -> dict[str, str]:
        contents = {name: yaml.safe_load(self._file(name).read_text())["config"] for name in self.names}
        return {
            name: f"{config['private-registry:hostname']}:{config['private-registry:container']['port']}"
            for name, config in contents.items()
        }

    def _file(self, name: str) -> Path:
        return self.folder / f"Pulumi.{name}.yaml"

    def _write(self, name: str, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a stack's file; each change is of a section, and the salt stays."""
        content = yaml.safe_load(self._file(name).read_text()) if self._file(name).exists() else {}
        config = content.setdefault("config", {}) or {
            "private-registry:hostname": f"{name}.test",
            "private-registry:container": {"name": name, "port": free_port()},
            "private-registry:storage": {"volume": name, "onDestroy": "delete"},
            "private-registry:image": {"repository": f"test/{name}"},
            "private-registry:trust": {"docker": True, "hostsFile": True},
        }
        for section, values in changes.items():
            config[f"private-registry:{section}"] |= values
        self._file(name).write_text(yaml.safe_dump({**content, "config": config}))

    def change(self, name: str, section: str, **values: Any) -> None:
        """Change a section of a stack's file, as a pull request does."""
        self._write(name, {section: values})

    def pulumi(self, *arguments: str) -> str:
        """Run the CLI as an operator does, beside the workflows."""
        environment = {
            **environment_of_toolchain(),
            "DOCKER_HOST": os.environ["DOCKER_HOST"],
            "PULUMI_BACKEND_URL": self.values["vars.PULUMI_BACKEND_URL"],
            "PULUMI_CONFIG_PASSPHRASE": PASSPHRASE,
        }
        command = ["pulumi", "--non-interactive", "--color", "never", *arguments]
        run = subprocess.run(
            command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def run(self, workflow: str, **values: str) -> "Run":
        """Run a workflow on the files as they are now."""
        self.runs += 1
        folder = self.folder.parent / f"run-{self.runs}"
        folder.mkdir()
        return Run(self, parsed(workflow), {**self.values, **values}, folder)


class Run:
    """One run of a workflow: its jobs in their order, each in a folder of its own."""

    def __init__(self, repository: Repository, workflow: Mapping[str, Any], values: dict[str, str], folder: Path) -> None:
        self.repository = repository
        self.workflow = workflow
        self.values = values
        self.folder = folder
        self.results: dict[str, str] = {}
        self.log = ""
        self.summary = ""
        for name, job in workflow["jobs"].items():
            needs = [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", [])
            assert all(need in self.results for need in needs), f"{name} is written before what it needs"
            wanted = self.valued(_bare(job["if"])) if "if" in job else all(self.results[need] == "success" for need in needs)
            self.results[name] = self._job(name, job) if wanted else "skipped"

    def valued(self, text: object, further: Mapping[str, str] | None = None) -> str:
        """Return a text with its expressions' values; one that has none in the table fails the test."""
        values = {**self.values, **(further or {})}
        return EXPRESSION.sub(lambda found: values[found[1]], str(text))

    def _job(self, name: str, job: Mapping[str, Any]) -> str:
        matrix = job.get("strategy", {}).get("matrix", {"": "[0]"})
        assert len(matrix) == 1
        (axis, expression), *_ = matrix.items()
        entries = json.loads(self.valued(re.sub(r"fromJSON\((.*)\)", r"\1", expression)))
        succeeded = [self._instance(name, job, {f"matrix.{axis}": str(entry)}) for entry in entries]
        return "success" if all(succeeded) else "failure"

    def _instance(self, name: str, job: Mapping[str, Any], values: dict[str, str]) -> bool:
        """Run a job with one entry of its matrix, and tell whether it succeeded."""
        folder = self.folder / f"{name}-{'-'.join(values.values())}"
        checkout, temporary = folder / "checkout", folder / "temporary"
        shutil.copytree(self.repository.folder, checkout, symlinks=True)
        temporary.mkdir()
        succeeded = True
        for index, step in enumerate(job["steps"]):
            if not (self.valued(_bare(step["if"])) if "if" in step else succeeded):
                continue
            if "uses" in step:
                self._action(
                    step["uses"].partition("@")[0], {k: self.valued(v, values) for k, v in step["with"].items()}, checkout
                )
                continue
            output, summary = temporary / f"{index}.output", temporary / f"{index}.summary"
            declared = {**self.workflow.get("env", {}), **job.get("env", {}), **step.get("env", {})}
            environment = {
                **self.repository.environment,
                "GITHUB_REPOSITORY": "owner/name",
                "GITHUB_API_URL": self.repository.api,
                "RUNNER_TEMP": str(temporary),
                "GITHUB_OUTPUT": str(output),
                "GITHUB_STEP_SUMMARY": str(summary),
                **{key: self.valued(value, values) for key, value in declared.items()},
            }
            output.touch()
            summary.touch()
            assert self.workflow["defaults"]["run"] == {"shell": "bash"}
            done = bash(step["run"], checkout, environment)
            self.log += f"{name}: {step['name']}: exit {done.returncode}\n{done.stdout}"
            self.summary += summary.read_text()
            succeeded = succeeded and done.returncode == 0
            for line in output.read_text().splitlines():
                key, _, value = line.partition("=")
                values[f"steps.{step['id']}.outputs.{key}"] = value
        for key, expression in job.get("outputs", {}).items():
            self.values[f"needs.{name}.outputs.{key}"] = self.valued(expression, values)
        return succeeded

    def _action(self, name: str, given: Mapping[str, str], checkout: Path) -> None:
        """Do what an action does: the folder is checked out already, and artifacts are kept beside it."""
        artifacts = self.folder / "artifacts"
        if name == "actions/upload-artifact":
            if (checkout / given["path"]).exists():
                shutil.copytree(checkout / given["path"], artifacts / given["name"])
        elif name == "actions/download-artifact":
            assert given["merge-multiple"] == "True"
            (checkout / given["path"]).mkdir()
            for artifact in artifacts.glob(given["pattern"]):
                shutil.copytree(artifact, checkout / given["path"], dirs_exist_ok=True)
        else:
            assert name == "actions/checkout"


def _bare(condition: str) -> str:
    """Return a condition as an expression: GitHub lets the braces be left out."""
    return condition if condition.startswith("${{") else f"${{{{ {condition} }}}}"


@pytest.fixture
def forge() -> Iterator[Forge]:
    with running_forge() as forge:
        yield forge


@pytest.fixture
def repository(tmp_path: Path, daemon: docker.DockerClient, forge: Forge) -> Iterator[Repository]:
    number = uuid.uuid4().hex[:8]
    made = Repository(tmp_path, [f"w{number}a", f"w{number}b"], forge.url)
    try:
        yield made
    finally:
        for name, address in made.addresses.items():
            remove_from_daemon(name, daemon)
            remove_trust(name, address)


def test_a_pull_request_has_one_comment_per_stack_that_the_next_run_updates(repository: Repository, forge: Forge) -> None:
    run = repository.run("preview.yml")
    assert run.results == {"fork": "skipped", "stacks": "success", "preview": "success", "comment": "success"}, run.log
    assert [body.splitlines()[:2] for body in forge.bodies] == [
        [f"<!-- private-registry report {name} -->", f"### {name}: fine"] for name in repository.names
    ]
    assert run.summary.count(": fine\n") == 2
    run = repository.run("preview.yml", **{"secrets.PULUMI_CONFIG_PASSPHRASE": "a wrong one"})
    assert run.results == {"fork": "skipped", "stacks": "success", "preview": "failure", "comment": "success"}, run.log
    assert [body.splitlines()[1] for body in forge.bodies] == [f"### {name}: the preview failed" for name in repository.names]
    assert "incorrect passphrase" in forge.bodies[0]
    assert "a wrong one" not in forge.bodies[0] + run.log + run.summary


def test_a_change_that_needs_approval_passes_and_says_so_and_one_that_would_lose_data_fails(
    repository: Repository, forge: Forge
) -> None:
    first, second = repository.names
    repository.pulumi("up", "--yes", "--skip-preview", "--stack", first)
    repository.change(first, "container", memoryMiB=512)
    run = repository.run("preview.yml")
    assert run.results["preview"] == "success", run.log
    assert f"::warning title={first} needs approval::" in run.log
    repository.change(first, "storage", volume=f"{first}-other")
    run = repository.run("preview.yml")
    assert run.results == {"fork": "skipped", "stacks": "success", "preview": "failure", "comment": "success"}, run.log
    assert f"::error title={first} would lose data::" in run.log
    assert [body.splitlines()[1] for body in forge.bodies] == [f"### {first}: would lose data", f"### {second}: fine"]


def test_a_pull_request_of_a_fork_is_not_previewed_and_says_so(repository: Repository, forge: Forge) -> None:
    run = repository.run("preview.yml", **FROM_A_FORK)
    assert run.results == {"fork": "success", "stacks": "skipped", "preview": "skipped", "comment": "skipped"}, run.log
    assert "the pull request is from a fork, which gets no secrets" in run.summary
    assert forge.comments == []


def test_what_is_merged_comes_to_all_stacks_and_drift_is_found_at_night(
    repository: Repository, daemon: docker.DockerClient
) -> None:
    run = repository.run("rollout.yml")
    assert run.results == {"before-production": "success", "production": "success"}, run.log
    assert all(daemon.containers.get(name).status == "running" for name in repository.names)
    run = repository.run("drift.yml")
    assert run.results == {"drift": "success"}, run.log
    daemon.containers.get(repository.names[1]).remove(force=True)
    run = repository.run("drift.yml")
    assert run.results == {"drift": "failure"}, run.log
    assert "::error title=Drift::" in run.log
    assert repository.names[1] in run.summary


def test_what_would_lose_data_stops_before_production_unless_it_is_named(
    repository: Repository, daemon: docker.DockerClient
) -> None:
    first, second = repository.names
    repository.pulumi("up", "--yes", "--skip-preview", "--stack", first)
    repository.change(first, "storage", volume=f"{first}-other")
    run = repository.run("rollout.yml")
    assert run.results == {"before-production": "failure", "production": "skipped"}, run.log
    assert "registry-images" in run.log
    assert daemon.containers.list(all=True, filters={"name": second}) == []
    run = repository.run("rollout.yml", **{"inputs.allow-data-loss": f"{first}/registry-images"})
    assert run.results == {"before-production": "success", "production": "success"}, run.log


def test_the_example_for_gitlab_comments_on_a_merge_request(repository: Repository, forge: Forge) -> None:
    forge.user = "project_5_bot"
    example = yaml.safe_load((ROOT / "docs/gitlab-ci.yml").read_text())
    environment = {
        **repository.environment,
        "PULUMI_BACKEND_URL": repository.values["vars.PULUMI_BACKEND_URL"],
        "PULUMI_CONFIG_PASSPHRASE": PASSPHRASE,
        "CI_API_V4_URL": forge.url,
        "CI_PROJECT_ID": "5",
        "CI_MERGE_REQUEST_IID": "7",
        "GITLAB_TOKEN": TOKEN,
    }
    for job in ("preview", "comment"):
        script = "\n".join([*example["default"]["before_script"], *example[job]["script"]])
        done = bash(script, repository.folder, environment)
        assert done.returncode == 0, done.stdout
    assert [body.splitlines()[1] for body in forge.bodies] == [f"### {name}: fine" for name in repository.names]


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_commands_have_no_expressions(workflow: str) -> None:
    for job in parsed(workflow)["jobs"].values():
        assert [step["run"] for step in job["steps"] if "${{" in step.get("run", "")] == []


def test_only_the_job_that_comments_may_write_and_it_gets_no_secret() -> None:
    jobs = {(workflow, name): job for workflow in WORKFLOWS for name, job in parsed(workflow)["jobs"].items()}
    writing = [job for job, content in jobs.items() if "write" in content.get("permissions", {}).values()]
    assert writing == [("preview.yml", "comment")]
    assert jobs[writing[0]]["permissions"] == {"contents": "read", "pull-requests": "write"}
    assert "{{ secrets." not in json.dumps(jobs[writing[0]])
    assert all(parsed(workflow)["permissions"] == {} for workflow in WORKFLOWS)


def test_a_job_that_gets_secrets_never_runs_for_a_fork() -> None:
    """A fork's code comes by pull_request alone; there, what has secrets needs the job that forks do not have."""
    for workflow in WORKFLOWS:
        events = parsed(workflow)[True]  # YAML 1.1 reads `on` so
        assert "pull_request_target" not in events
        if "pull_request" not in events:
            continue
        with_secrets = {name: job for name, job in parsed(workflow)["jobs"].items() if "{{ secrets." in json.dumps(job)}
        assert [name for name, job in with_secrets.items() if job.get("needs") != "stacks" or "if" in job] == []


def test_the_projects_own_checks_are_one_command_after_the_packages() -> None:
    """It would run this test: that it is the command which this run may have come from is all that can be said here."""
    (job,) = parsed("ci.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[0].startswith("apt-get update\n")
    assert commands[1:] == [".ci/run"]
    assert os.access(ROOT / ".ci/run", os.X_OK)

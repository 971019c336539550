"""launch/tpu_train.sh when gcloud fails: a failed look is not a missing slice."""

import subprocess

import pytest

from tests.launch.cloud import HERE, RUN

SMALL_TREE = True
DESCRIBE = "ERROR: (gcloud.compute.tpus.queued-resources.describe) "
# gcloud's own words; every one ends with status 1.
ERRORS = {
    "token": DESCRIBE + "There was a problem refreshing your current auth tokens: Reauthentication "
    "failed. cannot prompt during non-interactive execution.\\nPlease run:\\n\\n  $ gcloud auth "
    "login",
    "grant": DESCRIBE + "There was a problem refreshing your current auth tokens: ('invalid_grant: "
    "Bad Request', {'error': 'invalid_grant', 'error_description': 'Bad Request'})",
    "unauthenticated": DESCRIBE + "UNAUTHENTICATED: Request had invalid credentials.",
    "denied": DESCRIBE + "PERMISSION_DENIED: Permission 'tpu.queuedResources.get' denied on "
    "'projects/p/locations/z/queuedResources/t' (or it may not exist).",
    "location": DESCRIBE + "PERMISSION_DENIED: Location z is not found or access is unauthorized.",
    "deadline": DESCRIBE + "DEADLINE_EXCEEDED: Deadline Exceeded",
    "unavailable": DESCRIBE + "UNAVAILABLE: The service is currently unavailable.",
    "quota": DESCRIBE + "RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Requests'",
    "internal": DESCRIBE + "INTERNAL: an internal error has occurred",
    "network": "ERROR: gcloud crashed (ConnectionError): HTTPSConnectionPool("
    "host='tpu.googleapis.com', port=443): Max retries exceeded with url: /v2/projects/p/locations/z/queuedResources/t",
    "account": DESCRIBE + "You do not currently have an active account selected.",
    # NOT_FOUND of something else: a project that is called as the slice, another slice.
    "project": DESCRIBE + "NOT_FOUND: Resource 'projects/t' was not found",
    "other": DESCRIBE + "NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/t2' was not "
    "found",
    "parent": DESCRIBE + "NOT_FOUND: Resource 'projects/t/locations/z' was not found",
    "method": DESCRIBE + "NOT_FOUND: Method not found.",
    "silent": "",
}  # fmt: skip


def fails(*messages, status=1):
  return "".join(f"{status} {message}\n" for message in messages)


def test_failed_looks_in_mid_run_leave_the_run_alone(cloud):
  """Three failures in a row once deleted a healthy slice in training."""
  cloud.write("plan.t-0", "waits\n")
  messages = list(ERRORS.values())
  looks = [fails(*messages[at : at + 4]) for at in range(0, len(messages), 4)]
  cloud.write("fails.describe", "ok\n" * 3 + "ok\n".join(looks))
  training = cloud.start("train")
  cloud.until(lambda: not cloud.read("fails.describe"))
  assert len(cloud.runs) == 1
  cloud.write("end", "")
  assert training.wait(timeout=150) == 0, cloud.read("out")
  assert len(cloud.runs) == 1 and cloud.read("out").count("watching on") == len(looks)
  assert cloud.count("queued-resources create") == 1
  assert cloud.count("queued-resources delete") == 0


@pytest.mark.parametrize("group", range(2))
def test_a_failed_look_at_the_start_requests_no_second_slice(cloud, group):
  assert cloud("create").returncode == 0
  messages = list(ERRORS.values())[group::2]
  cloud.write("fails.describe", fails(*messages))
  done = cloud("create", "--wait=0.002")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "looking again in 0.002 s" in done.stdout and "looking again in 0.016 s" in done.stdout
  assert done.stdout.count("the state of t is unknown") == len(messages)
  assert cloud.count("queued-resources create") == 1
  assert cloud.count("queued-resources delete") == 0


@pytest.mark.parametrize("verb", ["train", "create", "delete", "stop", "sync", "setup", "run"])
def test_a_state_that_stays_unknown_ends_the_script_and_changes_nothing(cloud, verb):
  assert cloud("create").returncode == 0
  cloud.write("fails.describe", fails(*[ERRORS["token"]] * 20))
  done = cloud(verb, "--retries=2", "--wait=0.01")
  assert done.returncode == 3, done.stdout + done.stderr
  assert "still unknown after 3 looks" in done.stdout and "gcloud auth login" in done.stdout
  assert cloud.count("queued-resources create") == 1 and cloud.read("state") == "ACTIVE\n"
  assert cloud.count("queued-resources delete") == 0 and not cloud.runs


def test_a_look_that_hangs_has_failed(cloud):
  cloud.write("fails.describe", "hangs\n")
  done = cloud("train", "--timeout=1")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "no answer within 1 seconds" in done.stdout
  assert cloud.count("queued-resources create") == 1


def test_a_slice_that_is_missing_in_mid_run_is_made_anew(cloud):
  cloud.write("plan.t-0", "waits\n")
  training = cloud.start("train")
  cloud.until(lambda: cloud.runs)
  subprocess.run(
      [HERE / "gcloud.sh", "compute", "tpus", "queued-resources", "delete", "t"], check=True,
      env=cloud.environment,
  )  # fmt: skip
  assert training.wait(timeout=150) == 0, cloud.read("out")
  assert len(cloud.runs) == 2 and cloud.count("queued-resources create") == 2


@pytest.mark.parametrize("message", [ERRORS["deadline"], ERRORS["network"]])
def test_a_creation_that_fails_after_it_was_made(cloud, message):
  cloud.write("fails.create", f"done 1 {message}\n")
  done = cloud("train")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "t was made all the same" in done.stdout
  assert cloud.count("queued-resources create") == 1
  assert cloud.count("queued-resources delete") == 0


def test_a_slice_that_was_missing_by_mistake_is_used_again(cloud):
  """Google says twice that there is no slice; the request for one says that there is."""
  cloud.write("plan.t-0", "waits\n")
  missing = ERRORS["other"].replace("t2", "t")
  cloud.write("fails.describe", "ok\n" * 3 + fails(*[missing] * 3))
  training = cloud.start("train")
  cloud.until(lambda: "following the run" in cloud.read("out"))
  cloud.write("end", "")
  assert training.wait(timeout=150) == 0, cloud.read("out")
  assert len(cloud.runs) == 1 and "t was made all the same" in cloud.read("out")


def test_a_creation_that_fails_is_tried_again(cloud):
  cloud.write("fails.create", fails(ERRORS["quota"]))
  done = cloud("train")
  assert done.returncode == 0, done.stdout + done.stderr
  assert cloud.count("queued-resources create") == 2 and len(cloud.runs) == 1


def test_a_creation_that_google_refuses_is_not_tried_again(cloud):
  message = "INVALID_ARGUMENT: the accelerator v5litepod-32 was not found in zone z"
  cloud.write("fails.create", fails(DESCRIBE.replace("describe", "create") + message))
  done = cloud("train")
  assert done.returncode == 2 and message in done.stderr
  assert len(done.stderr.splitlines()) == 1 and cloud.count("queued-resources create") == 1


def test_a_deletion_that_fails_is_tried_again(cloud):
  cloud.write("create_failures", "1")
  cloud.write("fails.delete", fails(ERRORS["unavailable"]))
  done = cloud("train")
  assert done.returncode == 0, done.stdout + done.stderr
  assert cloud.count("queued-resources delete") == 2
  assert cloud.count("queued-resources create") == 2


def test_a_deletion_that_fails_for_ever_says_so(cloud):
  assert cloud("create").returncode == 0
  cloud.write("fails.delete", fails(*[ERRORS["denied"]] * 9))
  done = cloud("delete", "--retries=2", run=())
  assert done.returncode == 75 and "t is still ACTIVE, and may cost money" in done.stdout
  assert cloud.count("queued-resources delete") == 3


def test_a_deletion_that_fails_after_it_was_done(cloud):
  assert cloud("create").returncode == 0
  cloud.write("fails.delete", f"done 1 {ERRORS['deadline']}\n")
  done = cloud("delete", run=())
  assert done.returncode == 0 and "t is deleted" in done.stdout
  assert cloud.count("queued-resources delete") == 1


# Not all of them are words of gcloud.
STATES = [
    "CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING", "ACTIVATING",
    "STATE_UNSPECIFIED", "", "something else", "DELETING",
]  # fmt: skip


def test_states_that_are_no_reason_to_delete(cloud):
  assert cloud("create").returncode == 0
  cloud.write("states", "".join(state + "\n" for state in STATES))
  done = cloud("create")
  assert done.returncode == 0, done.stdout + done.stderr
  assert not cloud.read("states") and cloud.count("queued-resources create") == 1
  assert "ACTIVATING is a state that this script does not know" in done.stdout
  cloud.write("plan.t-0", "waits\n")
  cloud.write("states", "ACTIVE\n" + "".join(state + "\n" for state in STATES))
  training = cloud.start("train")
  cloud.until(lambda: not cloud.read("states"))
  cloud.write("end", "")
  assert training.wait(timeout=150) == 0, cloud.read("out")
  assert len(cloud.runs) == 1 and cloud.count("queued-resources delete") == 0


def test_machines_that_cannot_be_listed_are_not_missing(cloud):
  cloud.write("fails.nodes", fails(ERRORS["token"], ERRORS["network"]))
  done = cloud("train", "--retries=3", WORKERS="2")
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(cloud.runs) == 2 and cloud.count("queued-resources create") == 1
  assert "the machines of t are unknown" in done.stdout


def test_a_copy_that_the_network_breaks_deletes_nothing(cloud):
  cloud.write("fails.scp", fails("ERROR: (gcloud.compute.tpus.tpu-vm.scp) [/usr/bin/scp] exited"))
  done = cloud("train")
  assert done.returncode == 0, done.stdout + done.stderr
  assert cloud.count("queued-resources create") == 1
  assert cloud.count("queued-resources delete") == 0 and len(cloud.runs) == 1


def test_a_connection_that_breaks_leaves_the_run_alone(cloud):
  """The status of the run is known all the same: 0 of one machine, 1 of a run that diverged."""
  cloud.write("plan.t-0", "waits 1.5\n")
  cloud.write("fails.ssh-run", "breaks 0.6\nbreaks 0.6\n")
  done = cloud("train")
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(cloud.runs) == 1 and not cloud.read("fails.ssh-run")
  assert "following the run that began at" in done.stdout
  log = (cloud.logs / "t" / "1" / "0-0.log").read_text()
  assert "the connection broke" in log


@pytest.mark.parametrize("status", [1, 2, 255])
def test_a_status_of_gcloud_is_none_of_the_run(cloud, status):
  """An expired token ends gcloud with 1, which famjax gives to a loss that diverged."""
  cloud.write("fails.ssh-run", fails(ERRORS["token"], status=status))
  done = cloud("train")
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(cloud.runs) == 1 and "not tried again" not in done.stdout


def test_a_machine_that_stays_out_of_reach_ends_the_round(cloud):
  cloud.write("fails.ssh-run", fails(*["ERROR: [/usr/bin/ssh] exited with return code [255]."] * 3))
  done = cloud("train", "--retries=1")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "could not be reached 2 times in a row" in done.stdout
  assert cloud.count("queued-resources delete") == 0


def test_the_project_is_found_out_once(cloud):
  """`gcloud config set project` in another terminal must not make the slice disappear."""
  cloud.write("project", "mine\n")
  assert cloud("train", run=[RUN]).returncode == 0
  calls = [call for call in cloud.calls if call.startswith("compute ")]
  assert calls and all("--project=mine" in call for call in calls)

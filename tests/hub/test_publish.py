import pytest
from huggingface_hub import constants

from kdtool.errors import HubProblem
from kdtool.publish import check_write_access, publish, result_files
from kdtool.run import Run
from tests.hub.conftest import READER, STRANGER, TOKEN, Listener

WEIGHTS = bytes(range(256)) * 10


@pytest.fixture
def ada(near, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return near


@pytest.fixture
def result(tmp_path):
    folder = tmp_path / "student"
    (folder / ".kdtool").mkdir(parents=True)
    (folder / ".kdtool" / "run.json").write_text("{}")
    (folder / "plots").mkdir()
    (folder / "plots" / "loss.png").write_bytes(b"png")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text("---\ntags: [kdtool]\n---\n# student\n")
    (folder / ".report.md.part").write_text("unfinished")
    (folder / "data").mkdir()
    (folder / "data" / "annotations.jsonl").write_text("{}")  # texts made to train on stay here
    (folder / "link.json").symlink_to("/etc/hostname")
    return folder


def contents(folder):
    return {name: path.read_bytes() for name, path in result_files(folder).items()}


def test_one_commit_with_all_files_in_a_new_repository(hub, ada, result):
    made = publish(result, "ada/student", ada, private=True, message="First")
    repo = hub.repos["models", "ada/student"]
    held = dict(repo.at("main").files)
    assert held.pop(".gitattributes")
    assert held == contents(result)
    assert set(held) == {"README.md", "config.json", "model.safetensors", "plots/loss.png"}
    assert [commit.title for commit in repo.commits.values()] == ["initial", "First"]
    assert made == {"url": f"{hub.url}/ada/student", "commit": repo.refs["main"], "pull_request": None}
    assert repo.private
    assert len(hub.asked("/commit/")) == 1
    assert hub.asked("/lfs/"), "weights go through LFS"


def test_parts_of_large_files(hub, ada, result):
    hub.chunk = 1000
    publish(result, "ada/student", ada)
    assert hub.repos["models", "ada/student"].at("main").files["model.safetensors"] == WEIGHTS
    assert len(hub.asked("/part/", "PUT")) == 3


def test_a_pull_request_leaves_main_alone(hub, ada, result):
    repo = hub.add("bob/student", {"README.md": b"old"})
    before = repo.refs["main"]
    made = publish(result, "bob/student", ada, create_pr=True)
    assert repo.refs["main"] == before
    assert made["pull_request"] == f"{hub.url}/bob/student/discussions/1"
    assert repo.at("refs/pr/1").files["model.safetensors"] == WEIGHTS


def test_old_weights_that_would_be_loaded_instead_go_in_the_same_commit(hub, ada, result):
    old = {"model-00001-of-00002.safetensors": b"a", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    repo = hub.add("ada/student", old)
    publish(result, "ada/student", ada)
    assert set(repo.at("main").files) == set(contents(result)) | {"notes.txt"}
    assert len(repo.commits) == 2


def test_publishing_the_same_again_makes_no_commit(hub, ada, result):
    first = publish(result, "ada/student", ada)
    again = publish(result, "ada/student", ada)
    assert again["commit"] == first["commit"]
    assert len(hub.repos["models", "ada/student"].commits) == 2


PASSING = {
    "commit 503": {"path": "/commit/", "status": 503, "times": 2},
    "commit 429": {"path": "/commit/", "status": 429, "headers": {"Retry-After": "0"}},
    "commit closed": {"path": "/commit/", "close": True},
    "commit done, answer lost": {"path": "/commit/", "lose": True},
    "create closed": {"path": "/repos/create", "close": True},
    "create done, answer lost": {"path": "/repos/create", "lose": True},
    "create 503": {"path": "/repos/create", "status": 503},
    "preupload 503": {"path": "/preupload/", "status": 503},
    "upload 500": {"path": "/lfs/", "method": "PUT", "status": 500},
    "upload closed": {"path": "/lfs/", "method": "PUT", "close": True},
    "batch 503": {"path": "/objects/batch", "status": 503},
    "head 502": {"path": "/api/models/ada", "method": "GET", "status": 502},
}


@pytest.mark.parametrize("pr", [False, True])
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_faults_that_pass_leave_exactly_one_commit(hub, ada, result, fault, pr):
    if pr and "create" not in fault["path"]:
        hub.add("ada/student", {"notes.txt": b"mine"})
    hub.fail(**fault)
    made = publish(result, "ada/student", ada, create_pr=pr)
    repo = hub.repos["models", "ada/student"]
    assert len(repo.commits) == 2
    assert len(repo.requests) == int(pr)
    ref = "refs/pr/1" if pr else "main"
    assert made["commit"] == repo.refs[ref]
    assert contents(result).items() <= repo.at(ref).files.items()
    assert all(one.times == 0 for one in hub.faults)


def test_nothing_is_there_after_a_fault_that_lasts(hub, ada, result):
    repo = hub.add("ada/student", {"notes.txt": b"mine"})
    hub.fail("/commit/", status=503, times=99)
    before = contents(result)
    with pytest.raises(HubProblem, match="is complete, but not published: the Hub failed with status 503") as caught:
        publish(result, "ada/student", ada)
    assert str(result) in caught.value.message
    assert f"hf upload ada/student {result} . --exclude '.kdtool/*'" in caught.value.hint
    assert set(repo.at("main").files) == {"notes.txt"}
    assert contents(result) == before


def test_a_commit_of_someone_else_is_not_overwritten(hub, ada, result):
    repo = hub.add("ada/student", {"notes.txt": b"mine"})
    fault = hub.fail("/commit/", status=412, times=1)
    with pytest.raises(HubProblem, match="was changed meanwhile"):
        publish(result, "ada/student", ada)
    assert fault.times == 0
    assert len(repo.commits) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"path": "/commit/", "status": 403}, "no write permission"),
        ({"path": "/repos/create", "status": 403}, "no write permission"),
        ({"path": "/lfs/", "method": "PUT", "status": 400}, "not published"),
    ],
)
def test_refusals_while_publishing(hub, ada, result, fault, message):
    hub.fail(times=9, **fault)
    with pytest.raises(HubProblem, match=message) as caught:
        publish(result, "ada/student", ada)
    assert TOKEN not in f"{caught.value.message}{caught.value.why}{caught.value.hint}"


@pytest.mark.parametrize("repo", ["ada/new", "new", "lab/new"])
def test_repositories_one_may_make(hub, ada, repo):
    assert check_write_access(repo, ada) == (repo if "/" in repo else "ada/new")
    assert {request.method for request in hub.log} == {"GET"}, "checking makes nothing"


@pytest.mark.parametrize("repo", ["ada/there", "lab/there", "there"])
def test_repositories_one_may_write(hub, ada, repo):
    hub.add(repo if "/" in repo else "ada/there", {})
    assert check_write_access(repo, ada).endswith("/there")


@pytest.mark.parametrize(
    ("token", "repo", "how", "message"),
    [
        (None, "ada/new", {}, "needs a token"),
        ("secret-of-nobody", "ada/new", {}, "does not accept this token"),
        (READER, "ada/new", {}, "may only read"),
        (READER, "ada/there", {"create_pr": True}, "may only read"),
        (STRANGER, "ada/there", {}, "no write permission for 'ada/there'"),
        (STRANGER, "ada/new", {}, "may not make repositories in the name of 'ada'"),
        (TOKEN, "google/new", {}, "may not make repositories in the name of 'google'"),
        (TOKEN, "ada/there", {"private": True}, "is public, and the result is to be private"),
        (TOKEN, "ada/off", {}, "has been disabled"),
    ],
)
def test_refused_before_any_work(hub, near, monkeypatch, token, repo, how, message):
    hub.add("ada/there", {})
    hub.add("ada/off", {}, disabled=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubProblem, match=message) as caught:
        check_write_access(repo, near, **how)
    assert caught.value.hint
    assert "secret" not in f"{caught.value.message}{caught.value.why}{caught.value.hint}"


def test_a_pull_request_needs_no_right_to_write(hub, near, monkeypatch):
    hub.add("ada/there", {})
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert check_write_access("ada/there", near, create_pr=True) == "ada/there"


def test_a_hub_that_cannot_say_goes_by_the_owner(hub, ada):
    hub.add("ada/there", {})
    hub.add("bob/there", {})
    hub.fail("auth-check", status=404, times=9)
    assert check_write_access("ada/there", ada) == "ada/there"
    with pytest.raises(HubProblem, match="may not write in the name of 'bob'"):
        check_write_access("bob/there", ada)


def test_offline_refuses_without_a_request(hub, ada, monkeypatch):
    with pytest.raises(HubProblem, match="offline is set"):
        check_write_access("ada/new", Run(offline=True, reporter=Listener()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubProblem, match="offline is set"):
        check_write_access("ada/new", ada)
    assert hub.log == []

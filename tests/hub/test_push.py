"""`sparseq push` against the tests' Hub, with the real client in processes of its own."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from sparseq import SparseqConfig, SparseqForConditionalGeneration, SparseqTokenizer
from sparseq.cli import main
from sparseq.hub import upload
from sparseq.hub.card import resizing_code
from sparseq.hub.check import FolderCheck
from sparseq.hub.contents import Entry
from sparseq.hub.folder import write_hub_folder
from tests.hub.conftest import FOLDER_FILES
from tests.hub.repositories import File, Repository, is_lfs
from tests.hub.server import HubServer, _Handler

# One worker has the server and the terminal.
pytestmark = pytest.mark.xdist_group("hub-push")

READING = {"GET", "HEAD"}

_WITHOUT_PACKAGE = "import sys; sys.modules['sparseq'] = None\n"


@dataclass(frozen=True)
class Result:
    """What a command printed, and what it asked the Hub."""

    status: int
    out: str
    err: str
    requests: list[tuple[str, str]]

    @property
    def error(self) -> str:
        """The one line of the error."""
        assert self.status == 2, self
        (line,) = [line for line in self.err.splitlines() if line.startswith("sparseq: error: ")]
        return line.removeprefix("sparseq: error: ")

    @property
    def writes(self) -> list[tuple[str, str]]:
        return [(method, path) for method, path in self.requests if method not in READING]

    @property
    def uploaded_objects(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path in self.requests if method == "PUT"]


class Terminal:
    """Runs commands in one process, see shell.py."""

    def __init__(self, hub: HubServer, home: Path, **environment: str) -> None:
        self.hub = hub
        home.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("shell.py"))],
            cwd=home,
            env=hub.environment(home / "hf", **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def push(self, folder: Path, repo: str, *options: str, load: bool = False, **environment: str | None) -> Result:
        arguments = ["push", str(folder), repo, *options, *([] if load else ["--no-load-check"])]
        before = len(self.hub.requests)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"arguments": arguments, "environment": environment}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Result(**answer, requests=self.hub.requests[before:])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def terminal(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    terminal = Terminal(hub, tmp_path_factory.mktemp("terminal") / "home")
    yield terminal
    terminal.close()


@pytest.fixture(scope="module")
def model_folder(config: SparseqConfig, tokenizer: SparseqTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a run leaves it: a model, and what is no part of it."""
    model = SparseqForConditionalGeneration(SparseqConfig(**config.to_dict()))
    folder = write_hub_folder(model, tokenizer, tmp_path_factory.mktemp("model") / "model")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"x")
    return folder


@pytest.fixture(scope="module")
def sharded_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("sharded") / "model")
    (folder / "model.safetensors").unlink()
    SparseqForConditionalGeneration.from_pretrained(model_folder).save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def contents(folder: Path, names: set[str] = FOLDER_FILES) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def files(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    """What the repository holds besides the Hub's own file."""
    return {path: content for path, content in hub.files(repo, revision).items() if path != ".gitattributes"}


def test_from_the_folder_to_a_model_elsewhere(
    hub: HubServer, terminal: Terminal, model_folder: Path, tmp_path: Path
) -> None:
    """Everything at once: check, load, create, upload, verify; and the printed lines load this very commit."""
    result = terminal.push(model_folder, "owner/model.v1", "--private", "--message", "A first model", load=True)
    assert result.status == 0, result
    assert files(hub, "owner/model.v1") == contents(model_folder)
    assert hub.repositories["models", "owner/model.v1"].private
    pushed, _ = hub.commits("owner/model.v1")
    assert hub.repositories["models", "owner/model.v1"].commits[pushed].title == "A first model"
    assert f"{hub.url}/owner/model.v1/commit/{pushed}" in result.out
    for line in (
        r"  model\.safetensors +\d+ kB  weights",
        "left out: 2 entries",
        r"  checkpoint-5 +1 B  checkpoints",
        r"  training_args\.bin +1 B  .* a pickle",
    ):
        assert re.search(line, result.out), line
    assert "does not exist yet" in result.err
    assert "without sparseq" in result.err

    # A later commit changes nothing for who has the lines that were printed.
    hub.put("owner/model.v1", {"modeling_sparseq.py": b"raise SystemExit(3)\n", "tokenizer.json": b"{}"})
    code = result.out.partition("To load it:\n\n")[2]
    observe = "\nprint(type(model).__module__, tokenizer('A man')['input_ids'])\n"
    process = subprocess.run(
        [sys.executable, "-I", "-c", _WITHOUT_PACKAGE + code + observe],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "hf"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    ids = SparseqTokenizer.from_pretrained(model_folder)("A man")["input_ids"]
    assert (
        process.stdout.splitlines()[-1] == f"transformers_modules.owner.model_dot_v1.{pushed}.modeling_sparseq {ids}"
    )


def test_a_dry_run_writes_nothing(hub: HubServer, terminal: Terminal, model_folder: Path) -> None:
    result = terminal.push(model_folder, "owner/dry", "--dry-run")
    assert result.status == 0, result
    assert result.requests
    assert result.writes == []
    assert ("models", "owner/dry") not in hub.repositories
    assert f"to upload: {len(FOLDER_FILES)} entries" in result.out
    assert "nothing was changed" in result.out
    hub.create("owner/dry")
    hub.put("owner/dry", {"pytorch_model.bin": b"old", "notes.md": b"mine"})
    result = terminal.push(model_folder, "owner/dry", "--dry-run", "--revision", "v2")
    assert result.writes == []
    for line in (
        "owner/dry exists (public)",
        "its branch v2 does not exist yet",
        "deleted there, as files of an earlier model: pytorch_model.bin",
        "left there, since they are no files of a model that is loaded: notes.md",
    ):
        assert line in result.err


def test_a_folder_that_is_not_ready_is_not_even_mentioned(terminal: Terminal, folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"x")
    (folder / "generation_config.json").unlink()
    result = terminal.push(folder, "owner/unready")
    assert result.error == f"{folder} is not ready for the Hub:"
    assert "  - generation_config.json is missing" in result.err
    assert "  - weights.pt: a pickle" in result.err
    assert result.requests == []


def test_the_same_again_changes_nothing(hub: HubServer, terminal: Terminal, model_folder: Path) -> None:
    for _ in range(2):
        result = terminal.push(model_folder, "owner/again")
        assert result.status == 0, result
    assert len(hub.commits("owner/again")) == 2
    assert result.uploaded_objects == []
    assert "owner/again exists (public)" in result.err
    assert f"Nothing to upload, owner/again has the same files already: {hub.url}/owner/again/commit/" in result.out


def test_an_interrupted_push_goes_on(hub: HubServer, terminal: Terminal, sharded_folder: Path) -> None:
    names = FOLDER_FILES - {"model.safetensors"} | {path.name for path in sharded_folder.glob("*.safetensors*")}
    expected = contents(sharded_folder, names)
    large = [content for path, content in expected.items() if is_lfs(path, len(content))]
    assert len(large) > 4
    hub.interrupt("PUT", "/storage/", times=2, status=400)
    result = terminal.push(sharded_folder, "owner/interrupted")
    assert "Nothing in owner/interrupted was changed: try again: what has arrived is not sent twice" in result.error
    assert len(hub.commits("owner/interrupted")) == 1, "something was committed"
    arrived = set(hub.repositories["models", "owner/interrupted"].objects)
    result = terminal.push(sharded_folder, "owner/interrupted")
    assert result.status == 0, result
    assert not arrived & set(result.uploaded_objects), "what had arrived was sent again"
    assert len(arrived) + len(result.uploaded_objects) == len(large)
    assert len(hub.commits("owner/interrupted")) == 2
    assert files(hub, "owner/interrupted") == expected


def test_a_connection_that_drops_once_does_not_matter(hub: HubServer, terminal: Terminal, model_folder: Path) -> None:
    hub.interrupt("PUT", "/storage/models/owner/dropped")
    assert terminal.push(model_folder, "owner/dropped").status == 0
    assert files(hub, "owner/dropped") == contents(model_folder)


@pytest.mark.parametrize(
    ("name", "damage"), [("config.json", b"{}"), ("model.safetensors", b"x"), ("README.md", None)]
)
def test_verification_finds_what_the_hub_did_not_store(
    name: str,
    damage: bytes | None,
    hub: HubServer,
    terminal: Terminal,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = Repository.commit

    def commit(self: Repository, branch: str, title: str, files: dict[str, File]) -> Any:
        stored = {path: file for path, file in files.items() if path != name}
        if damage is not None and name in files:
            stored[name] = File(damage, files[name].lfs)
        return honest(self, branch, title, stored)

    monkeypatch.setattr(Repository, "commit", commit)
    repo = f"owner/damaged-{name}"
    result = terminal.push(model_folder, repo)
    assert result.error.startswith(f"{name} of {hub.url}/{repo}/commit/{hub.commits(repo)[0]} differ from")


def test_files_of_an_earlier_model_go_and_others_stay(hub: HubServer, terminal: Terminal, model_folder: Path) -> None:
    stale = {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("pytorch_model.bin", "training_args.bin", "added_tokens.json", "merges.txt"),
    }
    foreign = {"notes.md", "onnx/model.safetensors", "picture.png", "other.safetensors"}
    hub.create("owner/older")
    before = hub.put("owner/older", dict.fromkeys([*stale, *foreign, "config.json"], b"{}"))
    result = terminal.push(model_folder, "owner/older")
    assert result.status == 0, result
    assert set(files(hub, "owner/older")) == FOLDER_FILES | foreign
    assert hub.commits("owner/older")[1] == before, "deleted and uploaded in one commit"
    (line,) = [line for line in result.err.splitlines() if line.startswith("deleted there")]
    assert set(line.partition(": ")[2].split(", ")) == stale
    (line,) = [line for line in result.err.splitlines() if line.startswith("left there")]
    assert set(line.partition(": ")[2].split(", ")) == foreign


def test_branches(hub: HubServer, terminal: Terminal, model_folder: Path, folder: Path) -> None:
    hub.create("owner/branches")
    main = hub.put("owner/branches", {"notes.md": b"mine"})
    result = terminal.push(model_folder, "owner/branches", "--revision", "more/data")
    assert result.status == 0, result
    assert files(hub, "owner/branches", "more/data") == {**contents(model_folder), "notes.md": b"mine"}
    assert hub.commits("owner/branches") == [main, *hub.commits("owner/branches")[1:]]
    (folder / "LICENSE").write_text("Free.\n")
    assert terminal.push(folder, "owner/branches", "--revision", "more/data").status == 0
    assert "LICENSE" in files(hub, "owner/branches", "more/data")
    assert hub.commits("owner/branches")[0] == main
    result = terminal.push(model_folder, "owner/new-branch", "--revision", "v1")
    assert result.status == 0, result
    assert files(hub, "owner/new-branch") == {}
    assert files(hub, "owner/new-branch", "v1") == contents(model_folder)


def test_what_is_no_branch_is_not_pushed_to(hub: HubServer, terminal: Terminal, model_folder: Path) -> None:
    hub.create("owner/released")
    commit = hub.put("owner/released", {"notes.md": b"mine"})
    hub.repositories["models", "owner/released"].tags["v1.0"] = commit
    for revision, message in (
        ("v1.0", "v1.0 is a tag of owner/released, which no push moves: name a branch"),
        (commit[:7], f"{commit[:7]} names the commit {commit} of owner/released, which cannot be pushed to: name a"),
        (commit, f"{commit} is a commit, which cannot be pushed to: name a branch"),
    ):
        result = terminal.push(model_folder, "owner/released", "--revision", revision)
        assert result.error.startswith(message)
        assert result.writes == []


def test_what_people_have_written_is_not_replaced_without_a_word(
    hub: HubServer, terminal: Terminal, folder: Path
) -> None:
    hub.create("owner/written")
    ours = (folder / "README.md").read_bytes()
    (folder / "LICENSE").write_text("Free.\n", "utf-8")

    def replaced(card: bytes, license: bytes) -> list[str]:
        hub.put("owner/written", {"README.md": card, "LICENSE": license})
        result = terminal.push(folder, "owner/written", "--dry-run")
        assert result.status == 0, result
        return [line for line in result.err.splitlines() if line.startswith("replaced there")]

    assert replaced(b"---\nlicense: mit\n---\n# My model\n", b"Mine.\n") == [
        "replaced there: README.md, written by hand",
        "replaced there: LICENSE",
    ]
    # An earlier one of ours, Trainer's draft, and the very same text are nobody's work that is lost.
    for card in (
        ours + b"\n",
        b"---\nlicense: mit\n---\n<!-- This model card has been generated automatically -->\n",
        ours,
    ):
        assert replaced(card, b"Free.\n") == []
    mine = b"---\nlibrary_name: transformers\ntags: [mine]\n---\nMine.\n"
    (folder / "README.md").write_bytes(mine)
    assert replaced(mine, b"Free.\n") == []


def test_private_is_never_public(hub: HubServer, terminal: Terminal, model_folder: Path) -> None:
    hub.create("owner/public")
    result = terminal.push(model_folder, "owner/public", "--private")
    assert result.error.startswith("owner/public exists and is public, which --private does not change")
    assert result.writes == []
    hub.create("owner/hidden", private=True)
    assert terminal.push(model_folder, "owner/hidden").status == 0
    assert hub.repositories["models", "owner/hidden"].private
    hub.create("owner/gated", gated=True)
    assert terminal.push(model_folder, "owner/gated").status == 0


REFUSED: dict[str, tuple[str, str | None, str]] = {
    "no token": ("owner/x", None, "There is no token for http://127.0.0.1:"),
    "wrong token": ("owner/x", "hf_wrong", "The Hub does not accept the token (401: Invalid credentials"),
    "public of another": ("owner/theirs", "hf_other", "The token may not write to owner/theirs (403: "),
    "private of another": ("owner/secret", "hf_other", "The token may not write to owner/secret (403: You don't have"),
    "gated of another": ("owner/behind-gate", "hf_other", "The token may not write to owner/behind-gate (403"),
    "new under another": ("owner/new", "hf_other", "The token may not write to owner/new (403: You don't have"),
    "no user": ("model", "hf_owner", "'model' is no repository of the Hub: write user/name"),
    "dataset": ("datasets/owner/model", "hf_owner", "'datasets/owner/model' is no repository"),
    "a path": ("../model", "hf_owner", "'../model' is no repository"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_may_not_push(case: str, hub: HubServer, terminal: Terminal, model_folder: Path) -> None:
    if ("models", "owner/theirs") not in hub.repositories:
        hub.create("owner/theirs")
        hub.create("owner/secret", private=True)
        hub.create("owner/behind-gate", gated=True)
    repo, token, message = REFUSED[case]
    before = {name: set(repository.commits) for name, repository in hub.repositories.items()}
    result = terminal.push(model_folder, repo, HF_TOKEN=token)
    assert result.error.startswith(message)
    if case in ("no token", "wrong token", "public of another", "private of another"):
        assert "`hf auth login`" in result.error
    assert {name: set(repository.commits) for name, repository in hub.repositories.items()} == before


def test_somebody_pushes_meanwhile(
    hub: HubServer, terminal: Terminal, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create("owner/busy")
    honest = _Handler.preupload

    def preupload(self: _Handler, kind: str, repo: str, revision: str) -> Any:
        if not any(name == "config.json" for name in hub.files(repo)):
            hub.put(repo, {"config.json": b"theirs"})
        return honest(self, kind, repo, revision)

    monkeypatch.setattr(_Handler, "preupload", preupload)
    result = terminal.push(model_folder, "owner/busy")
    assert result.error.startswith(
        "Somebody else has pushed to owner/busy meanwhile (412: A commit has happened since"
    )
    assert files(hub, "owner/busy") == {"config.json": b"theirs"}
    result = terminal.push(model_folder, "owner/busy")
    assert result.status == 0, result
    assert files(hub, "owner/busy") == contents(model_folder)


@pytest.mark.parametrize("made", ["create_repo", "create_branch"])
def test_what_appears_before_the_first_commit_stays(
    made: str, hub: HubServer, terminal: Terminal, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was shown before the upload is what is done, or nothing is."""
    repo, branch = f"owner/appeared-{made}", "main" if made == "create_repo" else "v2"
    if made == "create_branch":
        hub.create(repo)
    honest = getattr(_Handler, made)

    def meanwhile(self: _Handler, **arguments: str) -> Any:
        answer = honest(self, **arguments)
        hub.put(repo, {"pytorch_model.bin": b"theirs"}, branch)
        return answer

    monkeypatch.setattr(_Handler, made, meanwhile)
    result = terminal.push(model_folder, repo, "--revision", branch)
    assert result.error.startswith(f"Somebody else has pushed to {repo} meanwhile, and nothing of yours was committed")
    assert files(hub, repo, branch) == {"pytorch_model.bin": b"theirs"}


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (("GET", "/api/models/owner/trouble"), None, "There is no connection to http://127.0.0.1:"),
        (("GET", "/api/models/owner/trouble"), 429, "The Hub does not answer at the moment (429: Interrupted"),
        (("POST", "/api/models/owner/trouble/commit"), 500, "The Hub does not answer at the moment (500: Interrupted"),
        (("POST", "/api/models/owner/trouble/commit"), 413, "The Hub refused the push to owner/trouble (413: "),
        (("POST", "/api/validate-yaml"), 400, "Invalid metadata in README.md."),
        (("GET", "/api/models/owner/trouble/tree"), 404, "The Hub refused the push to owner/trouble (404: "),
    ],
)
def test_trouble_on_the_way(
    request_: tuple[str, str],
    status: int | None,
    message: str,
    hub: HubServer,
    terminal: Terminal,
    model_folder: Path,
) -> None:
    if ("models", "owner/trouble") not in hub.repositories:
        hub.create("owner/trouble")
    hub.interrupt(*request_, times=1, status=status)
    result = terminal.push(model_folder, "owner/trouble")
    assert result.error.startswith(message)
    assert files(hub, "owner/trouble") == {}


@pytest.fixture(scope="module")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = SparseqForConditionalGeneration.from_pretrained(model_folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "owner/base"}))
    card = "---\nlibrary_name: peft\ntags:\n- lora\nbase_model: owner/base\n---\n# An adapter\n"
    (folder / "README.md").write_text(card, "utf-8")
    return folder


def test_adapters(hub: HubServer, terminal: Terminal, model_folder: Path, adapter_folder: Path) -> None:
    """An adapter is loaded upon its base from the Hub before it is pushed, to a repository of its own."""
    result = terminal.push(adapter_folder, "owner/adapter", load=True)
    assert "does not work where sparseq is not installed: fetching the base model owner/base: " in result.error
    assert result.writes == []
    assert ("models", "owner/adapter") not in hub.repositories
    assert terminal.push(model_folder, "owner/base", "--private").status == 0
    result = terminal.push(adapter_folder, "owner/adapter", load=True)
    assert result.status == 0, result
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert files(hub, "owner/adapter") == contents(adapter_folder, names)
    assert 'base = AutoModelForSeq2SeqLM.from_pretrained("owner/base", trust_remote_code=True)' in result.out
    pinned = f'PeftModel.from_pretrained(base, "owner/adapter", revision="{hub.commits("owner/adapter")[0]}")'
    assert pinned in result.out
    result = terminal.push(adapter_folder, "owner/base")
    assert result.error.startswith("owner/base holds a whole model (config.json), which would be loaded in place of")
    result = terminal.push(model_folder, "owner/adapter")
    assert result.error.startswith("owner/adapter holds an adapter (adapter_config.json), which would be loaded in")


_SHARD, _INDEX = "model-00001-of-00002.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("new", "stale"),
    [
        (["config.json", "model.safetensors"], {_SHARD, _INDEX, "pytorch_model.bin", "training_args.bin"}),
        # Pushes that bring no weights, or no tokenizer, leave those there.
        (["config.json", "README.md"], set()),
        (["tokenizer.json"], {"merges.txt"}),
        (["adapter_config.json", "adapter_model.safetensors"], {"adapter_model.bin", "training_args.bin"}),
        (["last-checkpoint/model.safetensors", "last-checkpoint/tokenizer.json"], set()),
    ],
)
def test_what_is_stale_depends_on_what_is_new(new: list[str], stale: set[str]) -> None:
    held = [_SHARD, _INDEX, "pytorch_model.bin", "training_args.bin", "merges.txt", "adapter_model.bin", "other.bin"]
    listed: Any = dict.fromkeys([*held, f"onnx/{_SHARD}", "config.json"])
    generation = {"generation_config.json", "custom_generate/generate.py"}
    listed.update(dict.fromkeys(generation))
    found = upload.stale_files(new, upload.Repository(name="a/b", branch="main", files=listed))
    assert set(found) == (stale | generation if "config.json" in new else stale)


def test_the_printed_code_holds_what_an_adapter_names(tmp_path: Path) -> None:
    """adapter_config.json may be somebody else's, and the lines are there to be copied and run."""
    name = 'v1", trust_remote_code=True)\nopen("ran", "w")  # '
    paths = ("adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
    entries = tuple(Entry(path=path, size=1, fate="upload", reason="") for path in paths)
    check = FolderCheck(
        folder=tmp_path,
        kind="adapter",
        entries=entries,
        problems=(),
        base_model=name,
        base_revision=name,
        grows_vocabulary=True,
    )
    tree = ast.parse(upload.loading_code(check, "owner/adapter", "0" * 40))
    (base,) = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "base"]
    assert isinstance(base.value, ast.Call)
    named = [base.value.args[0], *(one.value for one in base.value.keywords if one.arg == "revision")]
    assert [ast.literal_eval(one) for one in named] == [name, name]
    (grown,) = [node for node in tree.body if isinstance(node, ast.Expr)]
    assert ast.unparse(grown) == resizing_code("base")


def test_ctrl_c(model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(upload, "require_access", lambda: None)
    monkeypatch.setattr(
        upload, "read_repository", lambda name, branch: upload.Repository(name=name, branch=branch, files={})
    )
    monkeypatch.setattr(upload, "push_folder", interrupted)
    assert main(["push", str(model_folder), "owner/stopped", "--no-load-check"]) == 130
    assert "Interrupted; the same command goes on with what has not arrived." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, and give the same"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "There is no connection to http://127.0.0.1:9 ("),
    ],
)
def test_no_hub(environment: dict[str, str], message: str, hub: HubServer, model_folder: Path, tmp_path: Path) -> None:
    """The client reads these variables when it is imported, so each has a process of its own."""
    terminal = Terminal(hub, tmp_path / "home", **environment)
    result = terminal.push(model_folder, "owner/nowhere")
    assert result.error.startswith(message)
    if "HF_HUB_OFFLINE" in environment:
        result = terminal.push(model_folder, "owner/nowhere", "--dry-run")
        assert result.status == 0, result
        assert "HF_HUB_OFFLINE is set: owner/nowhere was not looked at" in result.err
        assert f"to upload: {len(FOLDER_FILES)} entries" in result.out
    assert result.requests == []
    terminal.close()

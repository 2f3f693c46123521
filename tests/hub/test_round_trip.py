"""Over the Hub and back: what is pushed loads elsewhere, with and without the package, and computes the same.

Each client is a process of its own that runs several jobs, since importing transformers is most of what one costs.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

import sparseq
from sparseq import SparseqConfig, SparseqForConditionalGeneration, SparseqTokenizer
from sparseq.modeling_sparseq import AUTO_MAP, CODE_FILES
from sparseq.training.lora import lora_config
from tests.hub.client import observe
from tests.hub.conftest import TEXTS, run_client
from tests.hub.server import HubServer

# The clients' results are made once and looked at by many tests.
pytestmark = pytest.mark.xdist_group("hub-round-trip")

MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "README.md", *CODE_FILES}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}

Results = dict[str, dict[str, Any]]


@dataclass
class World:
    """A Hub, what has been pushed to it, and what that computed before it was."""

    hub: HubServer
    folder: Path
    inputs: dict[str, torch.Tensor]
    expected: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    ids: list[list[int]] = field(default_factory=list)

    def run(self, name: str, jobs: dict[str, dict[str, Any]], package: bool, home: str, **more: str | None) -> Results:
        """Run named jobs in a new process whose caches are in `home`."""
        marker = str(self.folder / f"{name}.marker")
        environment = self.hub.environment(self.folder / home, MARKER=marker, **more)
        results = run_client(self.folder / name, self.inputs, *jobs.values(), package=package, environment=environment)
        return dict(zip(jobs, results, strict=True))

    def ran_code_of_the_repository(self, name: str) -> bool:
        return (self.folder / f"{name}.marker").exists()

    def check(self, result: dict[str, Any], which: str) -> None:
        """The result is, bit for bit, what was computed before the push."""
        assert "error" not in result, result["error"]
        found = load_file(result["outputs"])
        assert set(found) == set(self.expected[which])
        for name, tensor in self.expected[which].items():
            assert torch.equal(found[name], tensor), name


def seq2seq(repo: str, trust: bool = True, **options: Any) -> dict[str, Any]:
    return {"auto_class": "AutoModelForSeq2SeqLM", "folder": repo, "trust": trust, "options": options}


def tokens(repo: str, **options: Any) -> dict[str, Any]:
    return {"auto_class": "AutoTokenizer", "folder": repo, "texts": TEXTS, "options": options}


def a_model(config: SparseqConfig, seed: int) -> SparseqForConditionalGeneration:
    torch.manual_seed(seed)
    model = SparseqForConditionalGeneration(SparseqConfig(**config.to_dict())).eval()
    # A buffer that must travel too.
    for router in model.routers("encoder") + model.routers("decoder"):
        router.e_score_correction_bias.copy_(torch.rand(4))
    return model


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    config: SparseqConfig,
    tokenizer: SparseqTokenizer,
    inputs: dict[str, torch.Tensor],
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with HubServer(folder / "storage") as hub:
        yield World(hub, folder, inputs, ids=tokenizer(TEXTS)["input_ids"])


@pytest.fixture(scope="module")
def pushed(world: World, config: SparseqConfig, tokenizer: SparseqTokenizer) -> World:
    """Models, tokenizers and an adapter, pushed by `push_to_hub` where the package is installed."""
    hub, local = world.hub, world.folder / "local"
    models = {"first": a_model(config, 1), "second": a_model(config, 2)}
    for name, model in models.items():
        model.save_pretrained(local / name)
        world.expected[name] = observe(model, world.inputs)
        states = observe(model.model, world.inputs)["states"]
        encoded = model.get_encoder()(world.inputs["input_ids"], attention_mask=world.inputs["attention_mask"])
        world.expected |= {
            f"{name} decoder": {"states": states},
            f"{name} encoder": {"states": encoded.last_hidden_state.detach()},
        }
    tokenizer.save_pretrained(local / "tokenizer")
    adapted = get_peft_model(models["second"], lora_config(models["second"], "all", init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = "owner/model"
    adapted.save_pretrained(str(local / "adapter"))
    world.expected["adapter"] = observe(adapted.eval(), world.inputs)

    adapter = {"auto_class": "AutoPeftModelForSeq2SeqLM", "folder": str(local / "adapter")}
    jobs = {
        "first": seq2seq(str(local / "first"), False) | {"push": "owner/model"},
        "tokenizer": tokens(str(local / "tokenizer")) | {"push": "owner/model"},
        "second": seq2seq(str(local / "second"), False) | {"push": "owner/model"},
        "private": seq2seq(str(local / "first"), False) | {"push": "owner/private", "push_options": {"private": True}},
        "private tokenizer": tokens(str(local / "tokenizer")) | {"push": "owner/private"},
        "gated": seq2seq(str(local / "first"), False) | {"push": "owner/gated"},
        "whole": seq2seq(str(local / "second"), False) | {"push": "owner/sharded"},
        "sharded": seq2seq(str(local / "first"), False)
        | {"push": "owner/sharded", "push_options": {"max_shard_size": "100KB"}},
        "adapter": adapter | {"push": "owner/adapter"},
        "saved": seq2seq(str(local / "first"), False) | {"save": str(local / "saved")},
        "saved again": seq2seq(str(local / "first"), False)
        | {"save": str(local / "saved"), "save_options": {"push_to_hub": True, "repo_id": "owner/saved"}},
    }
    results = world.run("pushing", jobs, package=True, home="pushing-home")
    assert not [result["error"] for result in results.values() if "error" in result]
    hub.repositories["models", "owner/gated"].gated = True
    hub.readers |= {"owner/private": {"reader"}, "owner/gated": {"reader"}}

    # Code that tells that it ran, and code that is another commit's.
    files = hub.files("owner/model")
    for repo, branch, line in (
        ("owner/marked", "main", b'\nopen(__import__("os").environ["MARKER"], "w").close()\n'),
        ("owner/model", "other-code", b"\nOTHER = True\n"),
    ):
        if repo not in {name for _, name in hub.repositories}:
            hub.create(repo)
        hub.put(repo, files | {name: files[name] + line for name in CODE_FILES}, branch)
    return world


def first_commit(world: World) -> str:
    """The commit of the first push to owner/model."""
    return world.hub.commits("owner/model")[-2]


@pytest.fixture(scope="module")
def fresh(pushed: World) -> Results:
    """Where the package is absent and nothing is cached."""
    first = first_commit(pushed)
    jobs = {
        "untrusted": seq2seq("owner/marked", trust=False),
        "distrusted": seq2seq("owner/marked", trust=False, trust_remote_code=False),
        "untrusted config": {"auto_class": "AutoConfig", "folder": "owner/marked"},
        "tokenizer": tokens("owner/marked"),
        "distrusted tokenizer": tokens("owner/marked", trust_remote_code=False),
        "trusted tokenizer": tokens("owner/model", trust_remote_code=True),
        "model": seq2seq("owner/model") | {"save": str(pushed.folder / "again"), "push": "owner/again"},
        "model's tokenizer": tokens("owner/model") | {"push": "owner/again"},
        "revision": seq2seq("owner/model", revision=first),
        "code revision": seq2seq("owner/model", revision=first, code_revision="other-code"),
        "sharded": seq2seq("owner/sharded"),
        "decoder": {"auto_class": "AutoModel", "folder": "owner/model", "trust": True},
        "encoder": {"auto_class": "AutoModelForTextEncoding", "folder": "owner/model", "trust": True},
        "adapter": {"auto_class": "AutoPeftModelForSeq2SeqLM", "folder": "owner/adapter", "trust": True},
        "unknown revision": seq2seq("owner/model", revision="nowhere"),
        "absent": seq2seq("owner/absent"),
        "private tokenizer": tokens("owner/private", token="hf_reader"),
    }
    for repo in ("private", "gated"):
        # The reader last: what is in the cache loads for whoever has it.
        for user, token in (("other", "hf_other"), ("nobody", False), ("reader", "hf_reader")):
            jobs[f"{repo} {user}"] = seq2seq(f"owner/{repo}", token=token)
    return pushed.run("fresh", jobs, package=False, home="client-home")


@pytest.fixture(scope="module")
def cached(pushed: World, fresh: Results) -> tuple[Results, list[tuple[str, str]]]:
    """The same user once more, and what the Hub was asked for."""
    before = len(pushed.hub.requests)
    jobs = {
        "model": seq2seq("owner/model"),
        "tokenizer": tokens("owner/model"),
        "again": seq2seq("owner/again"),
        "again tokenizer": tokens("owner/again"),
        "marked": seq2seq("owner/marked"),
    }
    return pushed.run("cached", jobs, package=False, home="client-home"), pushed.hub.requests[before:]


@pytest.fixture(scope="module")
def offline(pushed: World, cached: Any) -> tuple[Results, list[tuple[str, str]]]:
    """The same user without a network."""
    before = len(pushed.hub.requests)
    jobs = {
        "model": seq2seq("owner/model"),
        "revision": seq2seq("owner/model", revision=first_commit(pushed)),
        "tokenizer": tokens("owner/model"),
        "never loaded": seq2seq("owner/never"),
        "other revision": seq2seq("owner/model", revision="nowhere"),
    }
    results = pushed.run("offline", jobs, package=False, home="client-home", HF_HUB_OFFLINE="1")
    return results, pushed.hub.requests[before:]


@pytest.fixture(scope="module")
def installed(pushed: World, fresh: Results) -> Results:
    """Where the package is installed, and no code is trusted."""
    jobs = {
        "model": seq2seq("owner/model", trust=False),
        "again": seq2seq("owner/again", trust=False),
        "marked": seq2seq("owner/marked", trust=False),
        "revision": seq2seq("owner/model", trust=False, revision=first_commit(pushed)),
        "tokenizer": tokens("owner/model"),
        "adapter": {"auto_class": "AutoPeftModelForSeq2SeqLM", "folder": "owner/adapter"},
        "private": seq2seq("owner/private", trust=False, token="hf_reader"),
        "private other": seq2seq("owner/private", trust=False, token="hf_other"),
    }
    return pushed.run("installed", jobs, package=True, home="installed-home")


def test_push_to_hub_uploads_all_that_loading_needs(pushed: World) -> None:
    files = pushed.hub.files("owner/model")
    assert set(files) == {".gitattributes", *MODEL_FILES, *TOKENIZER_FILES}
    for name in CODE_FILES:
        assert files[name] == Path(sparseq.__file__).with_name(name).read_bytes()
    assert set(pushed.hub.files("owner/model", first_commit(pushed))) == {".gitattributes", *MODEL_FILES}
    assert pushed.hub.repositories["models", "owner/private"].private
    shards = [name for name in pushed.hub.files("owner/sharded") if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert "model.safetensors" not in pushed.hub.files("owner/sharded"), "it would be loaded instead of the shards"
    # Saved where the code was already: the library uploads only what it finds changed.
    assert set(pushed.hub.files("owner/saved")) == {".gitattributes", *MODEL_FILES}
    assert set(pushed.hub.files("owner/adapter")) == {
        *(".gitattributes", "README.md"),
        *("adapter_config.json", "adapter_model.safetensors"),
    }


@pytest.mark.parametrize("name", ["untrusted", "distrusted", "untrusted config"])
def test_without_trust_nothing_of_the_repository_runs(name: str, pushed: World, fresh: Results) -> None:
    assert "trust_remote_code" in fresh[name]["error"]
    assert not pushed.ran_code_of_the_repository("fresh")


def test_the_marker_of_that_test_would_tell(pushed: World, cached: Any) -> None:
    pushed.check(cached[0]["marked"], "second")
    assert pushed.ran_code_of_the_repository("cached")


TOKENIZERS = ["tokenizer", "distrusted tokenizer", "trusted tokenizer", "model's tokenizer", "private tokenizer"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_needs_no_trust(name: str, pushed: World, fresh: Results) -> None:
    assert fresh[name]["ids"] == fresh[name]["label_ids"] == pushed.ids


def test_with_trust_the_model_computes_the_same(pushed: World, fresh: Results) -> None:
    pushed.check(fresh["model"], "second")
    assert fresh["model"]["class"] == "SparseqForConditionalGeneration"
    assert fresh["model"]["module"].startswith("transformers_modules.owner.model.")
    for name in ("decoder", "encoder"):
        pushed.check(fresh[name], f"second {name}")
    pushed.check(fresh["sharded"], "first")


def test_a_pinned_revision(pushed: World, fresh: Results) -> None:
    pushed.check(fresh["revision"], "first")
    assert "nowhere" in fresh["unknown revision"]["error"]


def test_code_from_one_commit_and_weights_from_another(pushed: World, fresh: Results) -> None:
    pushed.check(fresh["code revision"], "first")
    code = {
        branch: hashlib.sha256(pushed.hub.files("owner/model", branch)["modeling_sparseq.py"]).hexdigest()
        for branch in ("main", "other-code")
    }
    assert fresh["code revision"]["code"] == code["other-code"] != code["main"]
    assert fresh["revision"]["code"] == fresh["model"]["code"] == code["main"]


def test_an_adapter_finds_its_base_model(pushed: World, fresh: Results, installed: Results) -> None:
    pushed.check(fresh["adapter"], "adapter")
    pushed.check(installed["adapter"], "adapter")


@pytest.mark.parametrize("repo", ["private", "gated"])
def test_who_may_load(repo: str, pushed: World, fresh: Results) -> None:
    pushed.check(fresh[f"{repo} reader"], "first")
    word = {"private": "not a valid model identifier", "gated": "gated repo"}[repo]
    for user in ("other", "nobody"):
        assert word in fresh[f"{repo} {user}"]["error"]
        assert f"owner/{repo}" in fresh[f"{repo} {user}"]["error"]


def test_a_model_that_does_not_exist(fresh: Results) -> None:
    assert "owner/absent is not a local folder and is not a valid model identifier" in fresh["absent"]["error"]


def test_what_was_loaded_can_be_saved_and_pushed_again(pushed: World, cached: Any, installed: Results) -> None:
    names = {path.name for path in (pushed.folder / "again").iterdir()}
    assert names == MODEL_FILES - {"README.md"}
    before, after = pushed.hub.files("owner/model"), pushed.hub.files("owner/again")
    assert set(after) == set(before)
    for name in (*CODE_FILES, "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert after[name] == before[name], name
    for name, reference in AUTO_MAP.items():
        assert f'"{name}": "{reference}"' in after["config.json"].decode()
    pushed.check(cached[0]["again"], "second")
    assert cached[0]["again tokenizer"]["ids"] == pushed.ids
    pushed.check(installed["again"], "second")


def test_with_the_package_no_trust_is_needed_and_its_own_code_runs(pushed: World, installed: Results) -> None:
    pushed.check(installed["model"], "second")
    pushed.check(installed["marked"], "second")
    pushed.check(installed["revision"], "first")
    pushed.check(installed["private"], "first")
    assert "not a valid model identifier" in installed["private other"]["error"]
    assert {installed[name]["module"] for name in ("model", "marked")} == {"sparseq.modeling_sparseq"}
    assert not pushed.ran_code_of_the_repository("installed")
    assert installed["tokenizer"]["class"] == "SparseqTokenizer"
    assert installed["tokenizer"]["ids"] == pushed.ids


def test_a_second_load_downloads_nothing(pushed: World, cached: tuple[Results, list[tuple[str, str]]]) -> None:
    results, requests = cached
    pushed.check(results["model"], "second")
    assert results["tokenizer"]["ids"] == pushed.ids
    # It asks which commit main is, and gets nothing but answers of the API.
    assert ("GET", "/api/models/owner/model") in requests
    assert [
        path for method, path in requests if method == "GET" and re.match("/owner/model/|/storage/.*/model/", path)
    ] == []


def test_offline_what_is_cached_loads(pushed: World, offline: tuple[Results, list[tuple[str, str]]]) -> None:
    results, requests = offline
    pushed.check(results["model"], "second")
    pushed.check(results["revision"], "first")
    assert results["tokenizer"]["ids"] == pushed.ids
    assert requests == []


def test_offline_what_is_not_cached_says_so(offline: tuple[Results, list[tuple[str, str]]]) -> None:
    for name in ("never loaded", "other revision"):
        error = offline[0][name]["error"]
        print(error)
        assert "couldn't find them in the cached files" in error
        assert "offline mode" in error

"""Run folders."""

import json
from pathlib import Path

import pytest
import yaml

from moetrain.config import dump
from moetrain.errors import CheckpointError, ConfigError, StorageError
from moetrain.launch.runs import check_compatible, check_resume, config_hash, differences, open_run, resolve_run_dir


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("run.root=elsewhere", True),
        ("checkpoint.keep=9", True),
        ("logging.tensorboard=true", True),
        ("metrics.eval_batches=1", True),
        ("train.seed=1", False),
        ("optim.lr=1", False),
        ("router=mixtral", False),
        ("loss=[]", False),
    ],
)
def test_the_hash_is_of_what_distinguishes_runs(configure, override, same):
    assert (config_hash(configure(override)) == config_hash(configure())) is same


def test_the_same_command_gives_the_same_folder(configure):
    folder = resolve_run_dir(configure("run.root=here"))
    assert folder == resolve_run_dir(configure("run.root=here"))
    assert folder.parent == Path("here") and folder.name == f"deepseek_moe-{config_hash(configure())}"
    assert resolve_run_dir(configure("run.root=here", "run.name=mine")) == Path("here/mine")
    assert resolve_run_dir(configure("run.root=here", "run.name=mine", "run.dir=there")) == Path("there")


def test_never_resuming_numbers_a_derived_folder_and_refuses_a_chosen_one(configure, tmp_path):
    first = configure(f"run.root={tmp_path}")
    never = configure(f"run.root={tmp_path}", "checkpoint.resume=never")
    folder = resolve_run_dir(first)
    assert resolve_run_dir(never) == folder
    for suffix in ("-2", "-3"):
        open_run(first, folder if suffix == "-2" else folder.with_name(folder.name + "-2"))
        assert resolve_run_dir(never) == folder.with_name(folder.name + suffix)
    assert resolve_run_dir(first) == folder
    for field in (f"run.dir={folder}", f"run.name={folder.name}"):
        with pytest.raises(ConfigError, match=f"{field.partition('=')[0]} = .* holds a run already"):
            resolve_run_dir(configure(f"run.root={tmp_path}", field, "checkpoint.resume=never"))


def test_differences_name_the_leaves():
    old = {"a": {"b": 1, "c": 2}, "d": [1], "gone": {"x": 1}}
    new = {"a": {"b": 1, "c": 3}, "d": [1, 2], "new": None}
    assert list(differences(old, new)) == [("a.c", 2, 3), ("d", [1], [1, 2]), ("gone", {"x": 1}, None)]


def test_what_is_written_can_be_read_without_this_program(configure, tmp_path):
    config = configure("optim.lr=1e-5")
    open_run(config, tmp_path / "run")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == dump(config)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"command", "git_commit", "python", "torch", "cpus", "packages"} <= environment.keys()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.yaml", "environment.json"]


def test_opening_an_unchanged_run_again_records_no_change(configure, tmp_path):
    for _ in range(2):
        open_run(configure(), tmp_path)
    assert check_compatible(configure(), tmp_path) == []
    assert not (tmp_path / "config_changes.jsonl").exists()


ALLOWED = ["train.steps=9", "optim.lr=1", "schedule=constant", "parallel=single", "train.recompute=true", "train.micro_batch_size=1",
           "train.threads=1", "train.device=cpu", "train.max_skipped_steps=1", "launch.timeout_seconds=5", "logging.display=none",
           "metrics.every_steps=2", "checkpoint.keep=1"]  # fmt: skip


@pytest.mark.parametrize("override", ALLOWED)
def test_a_change_that_is_allowed_is_applied_and_recorded(configure, tmp_path, override):
    open_run(configure(), tmp_path)
    changed = configure(override)
    open_run(changed, tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == dump(changed)
    (line,) = (tmp_path / "config_changes.jsonl").read_text().splitlines()
    group = override.partition("=")[0]
    assert json.loads(line) and all(change["field"].startswith(group) for change in json.loads(line))


def test_every_change_that_is_not_allowed_is_listed_and_nothing_is_written(configure, tmp_path):
    open_run(configure(), tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        open_run(configure("train.seed=3", "train.steps=9", "optim.weight_decay=0.5", "model.hidden_size=128", "loss=[]"), tmp_path)
    fields = {p.field for p in caught.value.problems}
    assert {"train.seed", "optim.weight_decay", "model.hidden_size"} <= fields and "train.steps" not in fields
    assert any(field.startswith("loss") for field in fields)
    assert "train.seed = 3: the run in" in str(caught.value) and "has 0" in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == before and not (tmp_path / "config_changes.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"a: [", b"\xff\xfe", b"- 1\n"])
def test_a_damaged_config_yaml_is_one_message_naming_the_file(configure, tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.yaml"):
        check_compatible(configure(), tmp_path)


def test_resuming_from_a_folder_needs_a_run_or_a_checkpoint(configure, tmp_path):
    run, step = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000002"
    open_run(configure(), run)
    for refused in (tmp_path / "nothing", tmp_path, run):  # the run has no checkpoint yet
        with pytest.raises(CheckpointError, match="checkpoint.resume = "):
            check_resume(configure(f"checkpoint.resume={refused}"), tmp_path / "new")
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    for accepted in (run, step):
        check_resume(configure(f"checkpoint.resume={accepted}"), tmp_path / "new")
        with pytest.raises(ConfigError, match="model.hidden_size = 128"):
            check_resume(configure(f"checkpoint.resume={accepted}", "model.hidden_size=128"), tmp_path / "new")


def test_a_run_folder_that_is_a_file_or_cannot_be_made_is_refused(configure, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="must be a folder"):
        check_resume(configure(), tmp_path / "file")
    with pytest.raises(StorageError, match="Not a directory"):
        open_run(configure(), tmp_path / "file" / "run")

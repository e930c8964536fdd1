"""What the command line makes of groups, presets and overrides."""

import subprocess
import sys

import pytest

import moetrain.components  # noqa: F401  importing registers
from moetrain import registry
from moetrain.config import dump, load
from moetrain.errors import ConfigError
from moetrain.launch.compose import SweepError, build_config, run_application, shipped
from moetrain.train.settings import Config


def coefficients(plain):
    return {name: loss["coefficient"] for name, loss in plain["loss"].items()}


def test_the_default_loads_and_survives_a_round_trip(compose):
    config = build_config(compose()[0])
    assert config.model.kind == "deepseek_moe" and config.router.kind == "topk" and list(config.loss) == ["sequence_balance"]
    assert load(Config, dump(config)) == config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loss=[sequence_balance,z_loss]"], {"sequence_balance": 0.01, "z_loss": 0.001}),
        (["loss=[sequence_balance,z_loss]", "~loss.z_loss"], {"sequence_balance": 0.01}),
        (["loss=[sequence_balance,z_loss]", "loss.z_loss.coefficient=1"], {"sequence_balance": 0.01, "z_loss": 1}),
        (["loss=[z_loss]"], {"z_loss": 0.001}),
        (["loss=[]"], {}),
    ],
)
def test_losses_are_a_list_on_the_command_line_and_a_mapping_below(compose, overrides, expected):
    assert coefficients(compose(*overrides)[0]) == expected


def test_a_model_preset_chooses_its_parts_and_the_command_line_overrides_it(compose):
    glam = compose("model=glam_tiny")[0]
    assert (glam["router"]["renormalise"], glam["capacity"]["kind"], glam["experts"]["gated"]) == (True, "slots", False)
    changed = compose("capacity=none", "model=glam_tiny", "router=switch")[0]
    assert (changed["router"]["jitter"], changed["capacity"]["kind"], changed["experts"]["gated"]) == (0.01, "none", False)


@pytest.fixture
def experiments(tmp_path):
    """Arguments that add a folder with ``experiment=paper``."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "paper.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: glam_tiny\n  - override /router: switch\n  - _self_\n"
        "train:\n  steps: 7\nmodel:\n  num_experts: 16\n"
    )
    return ["--config-dir", str(tmp_path)]


def test_an_experiment_beats_the_model_preset_and_the_command_line_beats_both(compose, experiments):
    plain = compose(*experiments, "experiment=paper")[0]
    assert (plain["train"]["steps"], plain["model"]["num_experts"], plain["router"]["jitter"]) == (7, 16, 0.01)
    plain = compose(*experiments, "experiment=paper", "train.steps=9", "router=mixtral")[0]
    assert (plain["train"]["steps"], plain["model"]["num_experts"], plain["router"]["jitter"]) == (9, 16, 0.0)


def test_a_misspelt_experiment_is_refused_and_does_not_train_the_default(compose, experiments):
    with pytest.raises(ConfigError, match="experiment = 'nope': unknown option"):
        compose(*experiments, "experiment=nope")


def test_settings_that_follow_the_model_follow_it(configure):
    config = configure("model.num_experts=16", "model.top_k=3")
    assert (config.experts.num_experts, config.router.top_k) == (16, 3)


OPTIONS = [
    (group, name)
    for group in registry.groups()
    for name in dict.fromkeys([*registry.components(group), *shipped(group)])
    if group != "model" or name in shipped(group)
]
"""Every option of every group; of the models only the presets, since the bare components have no sizes."""


@pytest.mark.parametrize(("group", "name"), OPTIONS, ids=["=".join(option) for option in OPTIONS])
def test_every_option_composes_and_has_only_keys_that_its_component_knows(compose, group, name):
    choice = f"loss=[{name}]" if group == "loss" else f"{group}={name}"
    plain = compose(choice)[0]
    try:
        load(Config, plain)
    except ConfigError as error:
        # an option may need a path, or not fit the default model; it may not have keys or types that are wrong
        assert not [p for p in error.problems if "unknown key" in p.expected or p.expected.startswith("must be a")], error


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.stepz=3"], "train.stepz"),
        (["router=nope"], "router = 'nope': unknown option"),
        (["router=null"], "must be a string or a list"),
        (["train.seed=${nope.x}"], "nope.x"),
        (["foo"], "foo"),
        (["train.steps=[1"], r"\[1"),
        (["train.seed=0,1"], "train.seed=0,1"),
    ],
)
def test_what_hydra_refuses_is_a_configuration_error(compose, overrides, expected):
    arguments = list(sys.argv)
    with pytest.raises(ConfigError, match=expected):
        compose(*overrides)
    assert sys.argv == arguments


def test_all_problems_are_listed_at_once(configure):
    with pytest.raises(ConfigError) as caught:
        configure("++unknown.key=1", "++router.foo=2", "train.steps=abc", "train.seed=-1", "~objective")
    assert {p.field for p in caught.value.problems} == {"unknown", "router.foo", "train.steps", "train.seed", "objective"}


def test_the_layout_is_checked_for_the_ranks_that_will_run(configure, monkeypatch):
    with pytest.raises(ConfigError, match="train.global_batch_size = 16.*3 data-parallel ranks"):
        configure("launch.nproc_per_node=3")
    with pytest.raises(ConfigError, match="6 data-parallel ranks"):
        configure("launch.nproc_per_node=3", "launch.nnodes=2")
    for name, value in {"RANK": "1", "WORLD_SIZE": "5"}.items():  # torchrun decides, not launch.nproc_per_node
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="5 data-parallel ranks"):
        configure("launch.nproc_per_node=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.num_heads=3"], "parallel.tensor = 2: must divide model.num_heads .3."),
        (["model.num_heads=6", "model.num_kv_heads=3"], "parallel.tensor = 2: must divide model.num_kv_heads .3."),
        (["parallel.expert_tensor=2", "experts.width=7"], "parallel.expert_tensor = 2: must divide experts.width .7."),
        (["parallel.expert_tensor=4"], "parallel.expert_tensor = 4: must divide parallel.tensor .2."),
        (["launch.nproc_per_node=3"], "parallel.tensor = 2: must divide the 3 ranks of each replica"),
        (["train.global_batch_size=1", "launch.nproc_per_node=2", "data.seq_len=15"], "must divide the 15 tokens of a micro-batch"),
        (["train.global_batch_size=6", "launch.nproc_per_node=8"], "train.global_batch_size = 6: .* the 4 data-parallel ranks"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused_with_the_rule(configure, overrides, message):
    with pytest.raises(ConfigError, match=message):
        configure("parallel=ep", "parallel.tensor=2", "launch.nproc_per_node=4", *overrides)


def test_a_sweep_has_one_job_for_each_point_and_goes_on_after_failures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    def job(plain):
        seen.append(plain["train"]["seed"])
        if plain["train"]["seed"] in (1, 2):
            raise ConfigError(f"no {plain['train']['seed']}")

    with pytest.raises(SweepError) as caught:
        run_application(["train.seed=0,1,2,3", "-m"], job)
    assert seen == [0, 1, 2, 3]
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("2 jobs of the sweep failed") and "train.seed=2: no 2" in str(caught.value)


def test_one_job_leaves_no_files_of_hydra(compose, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compose()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_job_itself_is_not_taken_for_one_of_the_configuration():
    def job(plain):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_application([], job)


def test_help_shows_every_option_and_the_configuration_with_the_overrides(capsys):
    run_application(["--help", "model=glam_tiny", "optim.lr=0.5"], job=None)
    shown = capsys.readouterr().out
    groups, _, configuration = shown.partition("== Configuration ==")
    for group in (*registry.groups(), "experiment"):
        (line,) = [line for line in groups.splitlines() if line.startswith(f"{group}: ")]
        assert set(line.removeprefix(f"{group}: ").split(", ")) == {*registry.components(group), *shipped(group)}
    assert "kind: glam\n" in configuration and "lr: 0.5\n" in configuration and "hydra" not in configuration
    with pytest.raises(ConfigError, match="optim.lrr"):
        run_application(["optim.lrr=1", "-h"], job=None)


def test_settings_are_read_without_the_slow_imports_of_training():
    """torch.distributed.tensor and torch._dynamo, with sympy, take as long as torch itself."""
    script = "import sys, moetrain.launch.compose as c; c.compose(); print([m for m in ('sympy', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr

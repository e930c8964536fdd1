"""The command line as its users type it."""

import json
import subprocess
import sys

import pytest
from runs import TINY, environment, lines, losses, moetrain

from moetrain.cli import main
from moetrain.launch.compose import shipped


def test_overview_help_and_version(capsys):
    assert main([]) == 0 and "moetrain train" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("moetrain ")
    assert main(["nonsense"]) == 2 and "no command 'nonsense'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.stepss=3"], "train.stepss = '3': unknown key, did you mean steps?; valid keys: steps, seed,"),
        (["trian.steps=3"], "trian.steps = '3': unknown key, did you mean train?; valid keys:"),
        (["++unknown.key=1"], "unknown = {'key': 1}: unknown key"),
        (["++model.foo=1", "train.steps=abc", "optim.lr=-1"], "3 problems"),
        (["train.steps=abc"], "train.steps = 'abc': must be an integer"),
        (["router.top_k=99"], "router.top_k = 99: must be <= experts.num_experts (32)"),
        (["router=deepseek_v3", "router.num_groups=5"], "router.num_groups = 5: must divide the 32 experts"),
        (["data.seq_len=0"], "data.seq_len = 0: must be >= 1"),
        (["model=nope"], "model = 'nope': unknown option; valid options: deepseek_moe"),
        (["data=text", "data.path=missing.txt"], "missing.txt"),
        (["checkpoint.resume=nowhere"], "checkpoint.resume = 'nowhere'"),
        (["parallel.tensor=2"], "parallel.tensor = 2"),
        (["launch.nproc_per_node=3"], "train.global_batch_size = 16: must be divisible by the 3"),
        (["train.micro_batch_size=5"], "train.micro_batch_size = 5"),
        (["parallel=single", "launch.nproc_per_node=2"], "parallel = 'single'"),
        (["train.steps=[1"], "[1"),
        (["loss=null"], "list"),
        (["router=longcat", "loss=[device_balance]", "loss.device_balance.num_devices=4"], "router without zero_experts"),
        (["capacity=slots", "capacity.scope=rank", "capacity.num_groups=7"], "capacity.num_groups = 7: must divide"),
        (["data.tokenizer=missing.json"], "data.tokenizer = "),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(overrides, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *overrides]) == 2
    printed = capsys.readouterr()
    assert expected in printed.err and printed.err.startswith("moetrain: error:")
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "expected"), [(b"", "no text"), (b"  \n ", "no text"), (b"fine\xffbroken", "offset 4 is not UTF-8")])
def test_bad_data_is_refused_before_training(content, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOETRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.txt").write_bytes(content)
    assert main(["train", "data=text", "data.path=bad.txt"]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_cfg_job_prints_the_configuration_and_writes_nothing(tmp_path):
    done = moetrain("train", "model=glam_tiny", "--cfg", "job", folder=tmp_path)
    assert done.returncode == 0 and "output_z_loss: 0.0001" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_explains_groups_and_exit_codes(tmp_path):
    done = moetrain("train", "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "router:" in done.stdout and "Exit codes" in done.stdout


def test_list(capsys):
    assert main(["list", "routers"]) == 0
    out = capsys.readouterr().out
    assert "topk" in out and "deepseek_v3" in out
    assert main(["list", "routers", "topk"]) == 0 and "top_k" in capsys.readouterr().out
    assert main(["list", "router", "mixtral"]) == 0 and "renormalise: true" in capsys.readouterr().out
    assert main(["list", "nothing"]) == 2
    capsys.readouterr()
    assert main(["list", "experiments"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped("experiment")) and "2403.07652" in listed
    assert main(["list", "schedules"]) == 0
    listed = capsys.readouterr().out
    assert all(
        name in listed
        for name in ("cosine", "router.top_k_start", "router.temperature_start", "capacity.factor_start", "experts.spawn.after")
    )
    assert main(["list", "losses"]) == 0 and "mutual_information" in capsys.readouterr().out


def test_every_step_has_one_line_with_the_promised_fields(workspace):
    for number, line in enumerate(lines(workspace / "reference"), start=1):
        assert line["step"] == number
        promised = {"loss", "loss_total", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "lr", "experts"}
        assert promised <= line.keys()
        assert line["experts"]["layers.1.ffn"]["max_over_mean"] >= 1
        assert sum(line["experts"]["layers.1.ffn"]["load"]) == 2 * line["tokens"]
    run = workspace / "reference"
    assert {"config.yaml", "metrics.jsonl", "environment.json", "checkpoints", "tokenizer.json"} <= {p.name for p in run.iterdir()}
    assert json.loads((run / "environment.json").read_text())["torch"]


def test_evaluate_and_generate(workspace):
    evaluated = moetrain("evaluate", "run=reference", folder=workspace)
    assert evaluated.returncode == 0 and "perplexity" in evaluated.stdout
    fewer, whole, many = (moetrain("evaluate", "run=reference", f"top_k={k}", folder=workspace) for k in (1, 2, 9))
    assert fewer.returncode == 0 and fewer.stdout != evaluated.stdout == whole.stdout
    assert many.returncode == 2 and "router.top_k = 9: must be <= experts.num_experts (4)" in many.stderr
    first, second = (moetrain("generate", "run=reference", "prompt=7 times ", "max_new_tokens=12", folder=workspace) for _ in range(2))
    assert first.returncode == 0 and first.stdout.startswith("7 times ")
    assert first.stdout == second.stdout
    device = moetrain("generate", "run=reference", "prompt=x", "device=banana", folder=workspace)
    assert device.returncode == 2 and "device = 'banana'" in device.stderr
    missing = moetrain("generate", "run=nowhere", "prompt=x", folder=workspace)
    assert missing.returncode == 2 and "nowhere" in missing.stderr


def test_a_sweep_trains_each_point(workspace):
    done = moetrain("train", *TINY, "-m", "train.seed=0,1", "train.steps=2", "run.root=sweep", folder=workspace)
    assert done.returncode == 0, done.stderr
    runs = [p for p in (workspace / "sweep").iterdir() if (p / "metrics.jsonl").exists()]
    assert len(runs) == 2 and losses(runs[0]) != losses(runs[1])


def test_a_sweep_goes_on_after_a_job_that_cannot_run(workspace):
    done = moetrain("train", *TINY, "-m", "router.top_k=9,1", "train.steps=2", "run.root=sweep-bad", folder=workspace)
    assert done.returncode == 2 and "router.top_k = 9" in done.stderr
    assert len([p for p in (workspace / "sweep-bad").iterdir() if (p / "metrics.jsonl").exists()]) == 1


def test_torchrun(workspace, reference):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "moetrain.launch.train",
        *TINY,
        "run.dir=torchrun",
    ]
    done = subprocess.run(command, cwd=workspace, env=environment(workspace), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for (step, loss, norm), (step_, loss_, norm_) in zip(losses(workspace / "torchrun"), reference, strict=True):
        assert step == step_ and abs(loss - loss_) <= 1e-10 * loss_ and abs(norm - norm_) <= 1e-10 * norm_


def test_prepare(workspace):
    done = moetrain("prepare", *TINY, folder=workspace)
    assert done.returncode == 0 and "tokens in" in done.stdout


def test_sinks_and_bfloat16(workspace):
    extra = ["train.dtype=bfloat16", "logging.wandb=offline", "logging.tensorboard=true", "run.dir=sinks", "train.steps=3"]
    done = moetrain("train", *TINY, *extra, folder=workspace)
    assert done.returncode == 0, done.stderr
    run = workspace / "sinks"
    assert list((run / "tensorboard").glob("events*")) and list((run / "wandb").glob("offline-run-*"))
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_warnings_of_the_package_stay_visible_after_hydra_has_run(capsys):
    import logging

    log = logging.getLogger("moetrain.train.metrics")
    assert main(["train", "train.steps=0"]) == 2
    assert not log.disabled and logging.getLogger().level <= logging.WARNING

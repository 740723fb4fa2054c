"""Completion, in the shells themselves."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from dense2conv.cli import COMMANDS, config_keys, main
from dense2conv.completion import SHELLS, choices
from dense2conv.planner import PlanConfig

# What each shell offers for a line of which the last word is being typed.
ASK = {
    "bash": """COMP_LINE=%s; COMP_POINT=${#COMP_LINE}
        compopt() { true; }; _dense2conv; printf '%%s\\n' "${COMPREPLY[@]}\"""",
    "zsh": """compset() { true }; _files() { true }
        compadd() { shift ${@[(i)--]}; print -l -- "$@" }
        line=%s; words=(${(z)line}); [[ $line == *' ' ]] && words+=("")
        CURRENT=$#words; PREFIX="$words[-1]"; _dense2conv""",
    "fish": "complete -C %s | string replace -r '.*=(.)' '$1'",
}


@pytest.fixture(params=SHELLS)
def offered(request, tmp_path, monkeypatch, capsys):
    """A function of a line, in one of the shells."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.chdir(tmp_path)
    assert main(["completion", request.param]) == 0
    script = capsys.readouterr().out
    if request.param == "zsh":
        script = "compdef() { true }\n" + script

    def offer(line: str) -> list[str]:
        text = f"{script}\n{ASK[request.param] % shlex.quote(line)}"
        words = [request.param, "-c", text]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        return sorted(done.stdout.split())

    return offer


def test_commands_keys_groups_values_and_runs_are_offered(offered):
    assert offered("dense2conv ") == sorted(COMMANDS)
    assert offered("dense2conv tra") == ["train"]
    assert offered("dense2conv train objective.sc") == ["objective.scope="]
    assert offered("dense2conv train seed=1 objective.scope=") == ["layerwise", "network"]
    assert offered("dense2conv train objective.scope=n") == ["network"]
    assert offered("dense2conv train experiment=imagenet") == ["imagenet224", "imagenet64"]
    assert offered("dense2conv train hydra/sweeper=") == ["search"]
    assert offered("dense2conv train tensorboard=") == ["false", "true"]
    assert offered("dense2conv plan mesh=") == ["best", "given"]
    assert offered("dense2conv bench ") == ["data", "objective", "step"]
    assert offered("dense2conv bench data data.cac") == ["data.cache="]
    assert offered("dense2conv completion z") == ["zsh"]
    assert {"seed=", "--multirun", "data=", "data.side="} <= set(offered("dense2conv train "))
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/config.yaml").touch()
    assert offered("dense2conv prune run.name=") == ["mine"]


def test_the_choices_of_a_help_text_hold_its_default():
    found = {
        key: (default, choices(default, text)) for key, default, text in config_keys(PlanConfig())
    }
    named = {key for key, _, text in config_keys(PlanConfig()) if " | " in text}
    assert len(named) > 10
    for key in named:
        default, values = found[key]
        assert len(values) >= 2, key
        assert default is None or str(default) in values, key
    assert found["run.existing"][1] == ["fail", "keep_aside", "resume"]
    assert found["data.kind"][1][-3:] == ["mosaic", "gaussian", "noise"]
    assert choices("x", "no choice: at all") == []


def test_another_shell_or_none_is_told(capsys):
    assert main(["completion", "bosh"]) == 2
    assert "did you mean 'bash'" in capsys.readouterr().err
    assert main(["completion"]) == 2
    assert "bash|zsh|fish" in capsys.readouterr().out

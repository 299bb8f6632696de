"""Each command does what its help says: its own examples run, and models come from wherever they may."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import fxwidth
from fxwidth import work_progress
from fxwidth.commands import changing, faults, looking
from fxwidth.commands.app import app
from fxwidth.groups.group_names import named

OWN = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

def with_inputs():
    return net(), torch.randn(2, 8)

def wider():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(2, 8)

def of_images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), torch.randn(2, 3, 9, 9)

def batches():
    return [torch.randn(32, 8) for _ in range(2)]
"""
EXAMPLES = [
    example
    for module in (looking, changing)
    for name, examples in vars(module).items()
    if name.endswith("_EXAMPLES")
    for example in examples
]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def data(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_models.py").write_text(OWN)
    monkeypatch.delitem(__import__("sys").modules, "own_models", raising=False)
    return tmp_path


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_every_command_has_examples() -> None:
    commands = {example.split()[1] for example in EXAMPLES}
    assert commands == {info.callback.__name__ for info in app.registered_commands if info.callback is not None}


# Those that resize or time a whole network take as long as that does; a small one goes through the same below.
_TIMED = [
    pytest.param(one, marks=pytest.mark.slow) if one.split()[1] in ("evolve", "compare") else one for one in EXAMPLES
]


@pytest.mark.parametrize("example", _TIMED)
def test_an_example_runs(example: str, folder: Path) -> None:
    pytest.importorskip("torchvision")
    (folder / "plan.json").write_text('{"classifier.0": 500}')
    if "--out plan.json" in example:
        (folder / "plan.json").unlink()
    if example.split()[1] == "report":
        gm = fxwidth.resize(fxwidth.trace(small_net(), torch.randn(2, 8)), {"0": 10})
        fxwidth.save(gm, folder / "small.pt2")
    output = run(*shlex.split(example)[1:])
    assert output.strip()
    if "--json" in example:
        json.loads(output)


def test_inspect_tells_groups_kinds_reasons_and_costs(folder: Path) -> None:
    found = data("inspect", "own_models:net", "--input", "2x8")
    assert (found["params"], found["flops"]) == (212, 768)
    groups = {group["name"]: (group["width"], group["kind"], bool(group["pinned"])) for group in found["groups"]}
    assert groups == {"0": (16, "hidden", False), "0:1": (8, "input", True), "2": (4, "output", True)}
    assert len(found["spectra"]["0"]["singular_values"]) == 16
    text = run("inspect", "own_models:with_inputs")
    assert "own_models:with_inputs: 212 parameters, 768 flops, 1 of 3 groups are free" in text
    assert "the size of the model's output" in text
    assert "effective rank" in text


def test_every_name_that_inspect_prints_can_be_kept(folder: Path) -> None:
    (folder / "own_blocks.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def block(width):\n    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8))\n"
        "def net():\n    widths = (16, 16, 12, 16)\n"
        "    return nn.Sequential(*map(block, widths), nn.LSTM(8, 6)), torch.randn(2, 5, 8)\n"
    )
    tables = run("inspect", "own_blocks:net").split("Layers (each)")[0].split("\n\n")
    rows = [line for table in tables for line in table.splitlines() if re.match(r"\S+  +\d+  ", line)]
    names = list(dict.fromkeys(row.split()[0] for row in rows))
    assert {"0..1,3.0", "2.0"} <= set(names)
    groups = {group["name"]: bool(group["pinned"]) for group in data("inspect", "own_blocks:net")["groups"]}
    free = {name for name, pinned in groups.items() if not pinned}
    for name in names:
        result = CliRunner().invoke(app, ["plan", "own_blocks:net", "--ratio", "0.5", "--keep", name, "--json"])
        assert result.exit_code == 0, result.output
        kept = free - json.loads(result.stdout)["widths"].keys()
        assert kept == set(named(name, free))
        assert name != "0..1,3.0" or kept == {"0.0", "1.0", "3.0"}


def test_off_a_terminal_lines_on_standard_error_tell_how_far_long_work_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = list(logging.getLogger("fxwidth.work_progress").handlers)
    quick = CliRunner().invoke(app, ["plan", "own_models:with_inputs", "--params", "0.5", "--json"])
    assert (quick.exit_code, quick.stderr) == (0, "")
    seconds = iter(i * 0.6 for i in range(10**6))
    monkeypatch.setattr(work_progress.time, "monotonic", lambda: next(seconds))
    slow = CliRunner().invoke(app, ["plan", "own_models:with_inputs", "--params", "0.5", "--json"])
    assert slow.stdout == quick.stdout
    found = slow.stderr.splitlines()
    assert found
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d [a-z].*", line) for line in found)
    assert any(line.split(" ", 1)[1].startswith("analysing: ") for line in found)
    assert logging.getLogger("fxwidth.work_progress").handlers == handlers


def test_sizes_alone_need_no_weights() -> None:
    pytest.importorskip("torchvision")
    assert "spectra" not in data("inspect", "torchvision:squeezenet1_1", "--input", "1x3x64x64")


def test_from_a_plan_to_a_file_and_back(folder: Path) -> None:
    model = ["own_models:net", "--input", "2x8"]
    run("plan", *model, "--params", "0.5", "--out", "plan.json", "--data", "own_models:batches")
    plan = fxwidth.Plan.from_json((folder / "plan.json").read_text())
    assert plan.notes["cost"]["params"][1] <= 106
    assert str(plan.notes["evidence"]).startswith("data")
    told = data("evolve", *model, "--plan", "plan.json", "--out", "small.pt2")
    assert told["resizes"][0]["widths"] == {"0": [16, plan["0"]]}
    gm = fxwidth.load("small.pt2")
    assert gm.get_parameter("0.weight").shape == (plan["0"], 8)
    # What has become of the model that was traced is no matter of the file.
    kept = [{**one, "original": None} for one in (*data("report", "small.pt2")["resizes"], *told["resizes"])]
    assert kept[0] == kept[1]
    # A graph from a file can be inspected, and resized again.
    assert data("inspect", "small.pt2")["groups"][0]["width"] == plan["0"]
    run("evolve", "small.pt2", "--params", "0.5", "--out", "smaller.pt2")
    assert fxwidth.load("smaller.pt2").get_parameter("0.weight").shape[0] < plan["0"]


def test_a_file_of_tensors_needs_its_architecture(folder: Path) -> None:
    run("evolve", "own_models:with_inputs", "--params", "0.5", "--out", "small.safetensors")
    found = data("report", "small.safetensors", "--architecture", "own_models:with_inputs")
    assert len(found["resizes"]) == 1


def test_weights_are_read_from_a_file(folder: Path) -> None:
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in small_net().state_dict().items()}
    torch.save(state, folder / "w.pt")
    save_file(state, folder / "w.safetensors")
    ranks = [
        data("inspect", "own_models:with_inputs", "--weights", name)["spectra"]["0"]["effective_rank"]
        for name in ("w.pt", "w.safetensors")
    ]
    assert ranks == [pytest.approx(1.0, abs=1e-3)] * 2


@pytest.mark.slow
def test_compare_tells_costs_times_and_outputs(folder: Path) -> None:
    found = data("compare", "own_models:wider", "own_models:with_inputs")
    assert found["params"] == [420, 212]
    assert all(seconds > 0 for seconds in found["seconds"])
    assert found["output_difference"] > 0
    assert data("compare", "own_models:with_inputs", "own_models:with_inputs")["output_difference"] == 0
    assert "outputs: differ by" in run("compare", "own_models:wider", "own_models:with_inputs")


@pytest.mark.slow
def test_a_model_is_compared_with_a_file(folder: Path) -> None:
    run("evolve", "own_models:with_inputs", "--params", "0.5", "--out", "small.pt2")
    found = data("compare", "own_models:with_inputs", "small.pt2")
    assert found["params"][0] == 212
    assert found["params"][1] <= 106
    assert 0 < found["output_difference"] < 1
    run("evolve", "own_models:with_inputs", "--params", "0.5", "--out", "small.safetensors")
    named = "--architecture", "own_models:with_inputs"
    again = data("compare", "own_models:with_inputs", "small.safetensors", *named)
    assert again["params"] == found["params"]
    refused = CliRunner().invoke(app, ["compare", "own_models:with_inputs", "small.pt2", *named])
    assert refused.exit_code == 2
    assert "neither model is one" in refused.output


@pytest.mark.parametrize("runs", [("--no-run",), pytest.param((), marks=pytest.mark.slow)])
def test_models_are_compared_on_the_same_inputs(folder: Path, runs: tuple[str, ...]) -> None:
    run("evolve", "own_models:with_inputs", "--params", "0.5", "--out", "small.pt2")
    run("evolve", "own_models:with_inputs", "--params", "0.5", "--out", "small.safetensors")
    of_tensors = "small.safetensors", "--architecture", "own_models:with_inputs"
    flops = []
    for batch in (1, 4):
        typed = "--input", f"{batch}x8", *runs
        files = data("compare", "small.pt2", *of_tensors, *typed)["flops"]
        whole = data("compare", "own_models:with_inputs", "small.pt2", *typed)["flops"]
        assert files[0] == files[1] == whole[1]
        assert whole[0] % batch == 0
        flops.append(whole)
    assert [4 * one for one in flops[0]] == flops[1]
    # The file carries another batch than the model comes with.
    found = data("compare", "own_models:with_inputs", "small.pt2", *runs)["flops"]
    assert found[1] / found[0] == flops[0][1] / flops[0][0]
    assert data("compare", "small.pt2", "own_models:with_inputs", *runs)["flops"][::-1] == [
        flops[0][0] * 2,
        flops[0][1] * 2,
    ]


def test_models_that_take_different_inputs_are_not_compared(folder: Path) -> None:
    refused = CliRunner().invoke(app, ["compare", "own_models:with_inputs", "own_models:of_images", "--no-run"])
    assert refused.exit_code == 2
    assert "give --input that both take" in refused.output


def test_remedies_are_what_is_typed(folder: Path) -> None:
    source = "\n".join(
        path.read_text() for path in Path(fxwidth.__file__).parent.rglob("*.py") if path.name != "faults.py"
    )
    joined = re.sub(r'" *\n *f?"', "", source)
    for called in faults.AS_TYPED:
        assert called in joined, f"no message says {called!r} any more"
    refused = CliRunner().invoke(app, ["explain", "own_models:with_inputs", "nothing_like_it"])
    assert "fxwidth inspect lists all groups" in refused.output
    fxwidth.save(fxwidth.trace(small_net(), torch.randn(2, 8)), "graph.pt")
    assert "Pass --trusted" in CliRunner().invoke(app, ["inspect", "graph.pt"]).output


def test_a_file_is_looked_at_with_the_inputs_that_are_typed(folder: Path) -> None:
    run("evolve", "own_models:with_inputs", "--params", "0.5", "--out", "small.pt2")
    one, four = (data("inspect", "small.pt2", "--input", f"{batch}x8")["flops"] for batch in (1, 4))
    assert 4 * one == four


def test_a_folder_of_images_is_data(folder: Path) -> None:
    pytest.importorskip("torchvision")
    images = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        images.new("RGB", (50, 40), "teal").save(folder / "images" / name / "1.png")
    (folder / "own_images.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))\n"
    )
    found = data("plan", "own_images:net", "--input", "1x3x16x16", "--params", "0.6", "--data", "images")
    assert found["notes"]["evidence"].startswith("data")


# Of one on the meta device a trace says that its two modes differ, which of one with values it does not.
@pytest.mark.filterwarnings("ignore::fxwidth.errors.FxwidthWarning")
@pytest.mark.slow
def test_a_configuration_of_transformers_is_a_model(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=99, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder / "llama")
    for name in ("hf:llama", "hf:llama/config.json"):
        found = data("inspect", name)
        kinds = {group["kind"] for group in found["groups"]}
        assert {"heads", "head dim", "residual stream", "hidden", "entries looked up"} <= kinds
    assert "model.layers.0..2.mlp" in run("inspect", "hf:llama")


def test_a_model_of_timm() -> None:
    pytest.importorskip("timm")
    assert data("inspect", "timm:test_vit")["params"] > 0


def test_a_frontier_is_one_plan_for_each_bound(folder: Path) -> None:
    model = ["own_models:net", "--input", "2x8", "--weights", "w.pt"]
    torch.save(small_net().state_dict(), folder / "w.pt")
    found = data("plan", *model, "--frontier", "--params", "0.75,0.5", "--flops", "0.9", "--out", "frontier.json")
    assert found == json.loads((folder / "frontier.json").read_text())
    assert [row["budget"] for row in found["frontier"]] == [
        {"params": 0.75, "flops": 0.9},
        {"params": 0.5, "flops": 0.9},
    ]
    for row in found["frontier"]:
        alone = data("plan", *model, "--params", str(row["budget"]["params"]), "--flops", "0.9")
        assert row["plan"] == alone
    for typed, words in (
        (["--params", "0.9,0.5"], "0.9,0.5 are bounds for several plans; add --frontier"),
        (["--frontier", "--params", "0.9,few"], "--params few: a bound is a whole number"),
        (["--frontier", "--params", ","], "a frontier needs bounds for each plan"),
        (["--frontier", "--params", "0.9"], "a frontier needs bounds for each plan"),
    ):
        result = CliRunner().invoke(app, ["plan", *model, *typed])
        assert result.exit_code in (1, 2)
        assert words in result.output
    lines = run("plan", *model, "--frontier").splitlines()
    assert [line.split()[0] for line in lines if "params=" in line] == [
        f"params={share}" for share in (0.9, 0.75, 0.5, 0.25)
    ]


def test_a_report_is_a_page_of_any_model(folder: Path) -> None:
    run("evolve", "own_models:with_inputs", "--params", "0.5", "--out", "small.pt2")
    told = run("report", "small.pt2", "--html", "small.html")
    assert "written to small.html" in told
    page = (folder / "small.html").read_text()
    assert "Nothing was resized" not in page
    assert "readers refitted" in page
    run("report", "own_models:with_inputs", "--html", "whole.html")
    assert "Nothing was resized" in (folder / "whole.html").read_text()
    result = CliRunner().invoke(app, ["report", "own_models:with_inputs", "--html", "whole.html"])
    assert (result.exit_code, "--html whole.html is there already" in result.output) == (2, True)
    run("report", "own_models:with_inputs", "--html", "whole.html", "--overwrite")


def test_limits_are_typed_as_they_are_written_in_python(folder: Path) -> None:
    model = ["own_models:net", "--input", "2x8", "--weights", "w.pt"]
    torch.save(small_net().state_dict(), folder / "w.pt")
    assert data("plan", *model, "--ratio", "0.5")["widths"] == {"0": 8}
    assert data("plan", *model, "--ratio", "0.1", "--min-width", "0.25")["widths"] == {"0": 4}
    assert data("plan", *model, "--ratio", "0.1", "--min-width", "3")["widths"] == {"0": 3}
    assert data("evolve", *model, "--ratio", "0.5", "--out", "a.pt2")["resizes"][0]["widths"] == {"0": [16, 8]}
    result = CliRunner().invoke(app, ["plan", *model, "--within", "0"])
    assert (result.exit_code, "within=['0'] leaves no group that may change: '0' is in 2.weight" in result.output) == (
        1,
        True,
    )
    result = CliRunner().invoke(app, ["plan", *model, "--min-width", "few"])
    assert (result.exit_code, "--min-width few: a whole number, such as 8, or" in result.output) == (2, True)

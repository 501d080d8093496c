"""A small model planned for eight chips: its programs compile, its figures add up, its chips send what they should."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.cli.plan import Config
from rlhf_jax.cli.planning import run
from rlhf_jax.config import ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.pods.chips import read_topology
from rlhf_jax.pods.estimate import compiled, make_plan, pod_devices
from rlhf_jax.pods.hlo import Collective, collectives
from rlhf_jax.pods.kernels import BUNDLES, kernels
from rlhf_jax.pods.programs import Programs, Work

POD = read_topology("v5e:2x4")
MODEL = ModelConfig(
    vocab_size=2048,
    context=256,
    width=256,
    layers=4,
    heads=4,
    kv_heads=2,
    ffn_width=512,
    tied=False,
    dtype="bfloat16",
    scan_layers=True,
    remat="full",
    head_chunk=64,
)
WORK = Work(
    model=MODEL,
    stage="ppo",
    mesh={"data": 1, "fsdp": 8, "tensor": 1},
    prompt_length=64,
    response_length=64,
)


def shapes(found: list[Collective]) -> list[tuple[int, ...]]:
    return [dims for one in found for _, dims in one.shapes]


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return make_plan(WORK, POD)


def test_every_program_of_ppo_compiles_and_adds_up(plan: dict[str, Any]) -> None:
    assert set(plan["programs"]) == {"rollout", "scoring", "update"}
    assert plan["fits"]
    rounds = {"rollout": 1, "scoring": 1, "update": WORK.minibatches * WORK.epochs}
    for name, row in plan["programs"].items():
        mine = [piece for piece in plan["pieces"].values() if piece["program"] == name]
        pieces = sum(piece["estimate_seconds"] * piece["times"] for piece in mine)
        assert math.isclose(row["estimate_seconds"], max(pieces, rounds[name] * row["scheduled_seconds"]))
        # Both see the same work: loops and straight lines differ by what lies between the layers.
        assert name == "rollout" or 0.5 < rounds[name] * row["scheduled_seconds"] / pieces < 2
        held = plan["parameters_bytes"] + plan["optimizer_bytes"] + plan["frozen_bytes"]
        assert held < row["hbm_bytes"] < plan["limit_bytes"]
        assert row["estimate_seconds"] >= row["roofline_seconds"] > 0
    assert math.isclose(plan["step_seconds"], sum(row["estimate_seconds"] for row in plan["programs"].values()))
    assert math.isclose(plan["tokens_per_second"] * plan["step_seconds"], plan["tokens_per_step"])
    decode = plan["pieces"]["decode"]
    assert decode["over_limit"] > 1.0
    # One pass reads each weight at least once.
    assert decode["bytes"] >= decode["limit_bytes"]


def test_arithmetic_is_what_the_shape_says(plan: dict[str, Any]) -> None:
    gradient = plan["pieces"]["pretraining"]
    # The forward pass is done again in the backward: four thirds, and what attends is not halved by the mask.
    assert 1.0 < gradient["flops"] / gradient["model_flops"] < 1.6


@pytest.fixture(scope="module")
def update() -> list[Collective]:
    programs = Programs(dataclasses.replace(WORK, stage="pretrain", row_length=128).filled(), pod_devices(POD))
    return collectives(compiled(programs.whole()["update"], programs.mesh).as_text())


def test_layers_are_gathered_one_at_a_time(update: list[Collective]) -> None:
    gathered = [one for one in update if one.kind == "all-gather"]
    assert any(one.times >= MODEL.layers for one in gathered)
    assert not [dims for dims in shapes(gathered) if MODEL.layers in dims[:1] and math.prod(dims) > 256 * 512]


def test_logits_are_never_gathered(update: list[Collective]) -> None:
    # Rows of 128 tokens, in chunks of 64: with the vocabulary beside them they would be logits.
    assert not [dims for dims in shapes(update) if 2048 in dims and (64 in dims or 128 in dims)]


def sft_text(**change: Any) -> str:
    """An SFT step on rows of 192 tokens, compiled: no other length of the model is that."""
    work = dataclasses.replace(WORK, stage="sft", row_length=192, model=dataclasses.replace(MODEL, **change))
    programs = Programs(work.filled(), pod_devices(POD))
    text: str = compiled(programs.whole()["update"], programs.mesh).as_text()
    return text


def test_a_training_step_holds_a_kernel_and_no_scores() -> None:
    text = sft_text()
    # Forward, again in the backward pass, and its two gradients.
    assert set(re.findall(r"%splash_\w*?_(fwd|dkv|dq)_", text)) == {"fwd", "dkv", "dq"}
    assert "tpu_custom_call" in text
    # Alone, or the two query heads of a key head together.
    scores = r"\w+\[[\d,]*(?:192|384),192\]"
    assert not re.findall(scores, text)
    alone = sft_text(attention="plain")
    assert "tpu_custom_call" not in alone
    assert any(found.startswith("f32") for found in re.findall(scores, alone))


def test_kernels_are_counted_by_the_blocks_that_the_mask_leaves() -> None:
    model = dataclasses.replace(MODEL, context=1024)
    work = dataclasses.replace(WORK, stage="sft", row_length=1024, model=model)
    piece = Programs(work.filled(), pod_devices(POD)).pieces()["gradient"]
    found = kernels(compiled(piece.at(1), piece.on).as_text(), "v5e")
    # A row on each device, 4 heads of 64, three of four blocks of 512 x 512: two products twice, four and three.
    assert found["kernels"] == 4
    assert found["kernel_flops"] == 4 * 3 * (2 + 2 + 4 + 3) * 2 * 512 * 512 * 64
    assert found["kernel_cycles"] == 4 * 3 * (2089 + 2089 + 2330 + 1756)


def test_the_table_of_kernels_is_what_the_compiler_says() -> None:
    # Its flags are read when the compiler is loaded: in a process of its own.
    script = Path(__file__).parents[1] / "benchmarks" / "kernel_bundles.py"
    done = subprocess.run([sys.executable, str(script), "v5e:2x4"], capture_output=True, text=True, check=True)
    found = {
        int(block): tuple(int(n) for n in numbers.split(","))
        for block, numbers in re.findall(r"^v5e (\d+): \(([\d, ]+)\)", done.stdout, re.MULTILINE)
    }
    assert found.keys() == BUNDLES["v5e"].keys()
    # A few bundles depend on the lengths of the loops around a block.
    for block, known in BUNDLES["v5e"].items():
        for one, other in zip(found[block], known, strict=True):
            assert math.isclose(one, other, rel_tol=0.01), (block, found[block], known)


def test_decoding_gathers_weights_once() -> None:
    programs = Programs(WORK.filled(), pod_devices(POD))
    found = collectives(compiled(programs.whole()["rollout"], programs.mesh).as_text())
    in_loop = [one for one in found if one.times >= 63]
    assert in_loop
    assert max(one.received for one in in_loop) < 256 * 512, [one for one in in_loop if one.received >= 256 * 512]


def test_a_program_that_takes_too_much_memory_is_one_line() -> None:
    work = dataclasses.replace(
        WORK, stage="sft", row_length=256, batch=65536, model=dataclasses.replace(MODEL, head_chunk=0)
    )
    with pytest.raises(UserError, match=r"update: .*HBM") as caught:
        make_plan(work, POD, only="memory")
    assert "\n" not in str(caught.value)


def test_the_command_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    shape = tmp_path / "config.json"
    shape.write_text(json.dumps({"vocab_size": 512, "context": 64, "width": 64, "layers": 2, "heads": 2}))
    run(Config(model=str(shape), stage="sft", topology="v5e:2x4", json=str(file), price=1.2, tokens=1e9))
    plan = json.loads(file.read_text())
    assert plan["programs"]["update"]["hbm_bytes"] < plan["limit_bytes"] == 16 * 2**30
    assert math.isclose(plan["bill"], plan["chip_hours"] * 1.2)
    assert math.isclose(plan["chip_hours"], 1e9 / plan["tokens_per_second"] * 8 / 3600)
    assert "chip-hours" in capsys.readouterr().out

"""Plans without the TPU compiler: what is read, the arithmetic by hand, refusals; and the chunked loss behind them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import logprobs
from rlhf_jax.arrays import PromptBatch, TokenBatch
from rlhf_jax.cli.plan import Config
from rlhf_jax.cli.planning import first_that_fits, run
from rlhf_jax.config import EpisodeConfig, ModelConfig
from rlhf_jax.errors import UserError
from rlhf_jax.logprobs import positions_at_a_time, response_losses, target_losses
from rlhf_jax.model import Transformer, init_params
from rlhf_jax.packing import padded_episodes
from rlhf_jax.parallel.mesh import make_mesh, place, shard_rows
from rlhf_jax.pods.chips import CHIPS, Chip, Topology, check_mesh, read_topology, written
from rlhf_jax.pods.estimate import TooLarge, bill, check_compiled, check_fit, counted, extrapolated, timed
from rlhf_jax.pods.hlo import collectives
from rlhf_jax.pods.kernels import causal_blocks, kernels
from rlhf_jax.pods.models import read_model
from rlhf_jax.pods.programs import Programs, Work, bytes_of
from rlhf_jax.pods.traffic import cycles, hbm_bytes
from rlhf_jax.stages.ppo import sample

pytestmark = pytest.mark.pods

SMALL = ModelConfig(vocab_size=64, context=64, width=16, layers=2, heads=2, ffn_width=32, tied=False)
EVERY = {"data": 1, "fsdp": 8, "tensor": 1}


def test_a_topology_is_read() -> None:
    assert read_topology("v5e:16x16").chips == 256
    assert read_topology("v5p:4x4x8") == Topology(CHIPS["v5p"], (4, 4, 8))
    for text, wanted in {
        "v9:2x2": "one of v4, v5e",
        "v5e": "such as",
        "v5p:8x8": "expected 3 axes",
        "v5e:3x4": "use v5e:4x4",
    }.items():
        with pytest.raises(UserError, match=wanted):
            read_topology(text)


def test_a_mesh_that_does_not_fit_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match="expected the 256 devices of v5e:16x16, got fsdp=128, 128 devices; use --mesh fsdp=256"
    ):
        check_mesh({"data": 1, "fsdp": 128, "tensor": 1}, read_topology("v5e:16x16"))
    with pytest.raises(UserError, match="use --mesh data=2,fsdp=2,tensor=2"):
        check_mesh({"data": 2, "fsdp": 3, "tensor": 2}, read_topology("v5e:2x4"))
    check_mesh({"data": 2, "fsdp": 2, "tensor": 2}, read_topology("v5e:2x4"))


def test_links_by_hand() -> None:
    pod = read_topology("v5e:16x16")
    assert pod.links([(x, y) for x in range(16) for y in range(16)]) == 4  # two rings
    assert pod.links([(0, y) for y in range(16)]) == 2
    assert pod.links([(0, y) for y in range(8)]) == 1  # a line: its ends have one neighbour
    assert read_topology("v5e:2x4").links([(x, y) for x in range(2) for y in range(4)]) == 2
    assert CHIPS["v5e"].link == 50e9


def test_a_model_is_read(tmp_path: Path) -> None:
    model = read_model("llama3-8b")
    # 32 (2 · 4096² + 2 · 4096 · 1024 + 3 · 4096 · 14336) + 2 · 128256 · 4096, without norms.
    assert model.matmul_parameters() + model.vocab_rows * model.width == 8_029_995_008
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"vocab_size": 64, "width": 16, "heads": 2}))
    assert read_model(str(file)).width == 16
    file.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "vocab_size": 64,
                "max_position_embeddings": 32,
                "hidden_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            }
        )
    )
    assert read_model(f"hf:{tmp_path}").layers == 3
    for text in ("llama9", f"hf:{tmp_path / 'none'}"):
        with pytest.raises(UserError, match="expected one of llama3-8b"):
            read_model(text)
    file.write_text("{")
    with pytest.raises(UserError, match="unreadable"):
        read_model(str(file))
    file.write_text('{"model_type": "rnn"}')
    with pytest.raises(UserError, match=r"field 'model_type': expected one of .*, got 'rnn'"):
        read_model(str(file))


def test_rows_that_do_not_divide_or_are_too_long() -> None:
    work = Work(model=SMALL, stage="sft", mesh=EVERY)
    assert dataclasses.replace(work, microbatches=2).filled().batch == 16
    assert work.filled().row_length == 64
    with pytest.raises(UserError, match=r"batch 12 is not divisible by 8 devices .* x 1 parts; use --batch 8"):
        dataclasses.replace(work, batch=12).filled()
    with pytest.raises(UserError, match="longer than the model's context 64; use --row-length 64"):
        dataclasses.replace(work, row_length=65).filled()
    ppo = Work(model=SMALL, stage="ppo", mesh=EVERY, prompt_length=8, response_length=8)
    filled = ppo.filled()
    assert (filled.batch, filled.pretraining_batch, filled.row_length, filled.decode_parts) == (32, 32, 16, 2)
    with pytest.raises(UserError, match="pretraining-batch 8 is not divisible"):
        dataclasses.replace(ppo, pretraining_batch=8).filled()
    with pytest.raises(UserError, match="decode_parts 3 does not divide fsdp 8; use --decode-parts 1"):
        dataclasses.replace(ppo, decode_parts=3).filled()


def test_bytes_by_hand_and_a_model_that_does_not_fit() -> None:
    work = Work(model=SMALL, stage="ppo", mesh=EVERY, prompt_length=8, response_length=8).filled()
    programs = Programs(work, jax.devices())
    blocks = 2 * (4 * 16 * 16 + 3 * 16 * 32)
    # Cut by eight: blocks, embedding and unembedding; norms and the score head are whole.
    policy = 4 * ((blocks + 2 * 64 * 16) // 8 + 5 * 16)
    critic = 4 * ((blocks + 64 * 16) // 8 + 5 * 16 + 16 + 1)
    assert bytes_of(programs.trained()) == policy + critic
    assert bytes_of(programs.frozen()) == policy + critic + 8
    # Rows over 8 devices: 32 rows x 2 key heads x 16 slots x 8 x 4 bytes x 2 layers, keys and values, and the mask.
    cache = programs.cache()
    assert bytes_of((cache.keys, cache.values)) == 2 * 2 * 32 * 2 * 16 * 8 * 4 // 8
    # A byte for four, and a scale of four bytes for each vector of eight.
    rounded = Programs(dataclasses.replace(work, cache_dtype="int8"), jax.devices()).cache()
    assert bytes_of((rounded.keys, rounded.values)) == 2 * 2 * 32 * 2 * 16 * (8 + 4) // 8
    tiny = Topology(dataclasses.replace(CHIPS["v5e"], memory=2000.0), (2, 4))
    with pytest.raises(
        UserError, match=r"expected at most .* before any work; use about 256 chips of v5e instead of 8"
    ):
        check_fit(programs, tiny)
    alone = Programs(dataclasses.replace(work, mesh={"data": 8, "fsdp": 1, "tensor": 1}, decode_parts=0), jax.devices())
    roomy = Topology(dataclasses.replace(CHIPS["v5e"], memory=90_000.0), (2, 4))
    with pytest.raises(UserError, match="use --mesh fsdp=8"):
        check_fit(alone, roomy)


HLO = """HloModule jit_f

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %all-gather.1 = bf16[32,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.1 (p: f32[32,8]) -> f32[4,8] {
  %all-reduce.9 = f32[32,8]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%again (p: f32[32,8]) -> f32[32,8] {
  %all-gather.2 = bf16[32,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %while.1 = (s32[], f32[4,8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %fusion.1 = f32[4,8] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = f32[32,8] fusion(%y), kind=kCustom, calls=%again
  %all-reduce.3 = f32[16]{0} all-reduce(%z), channel_id=3, replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add
  %all-to-all.4 = bf16[8,16]{1,0} all-to-all(%z), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}
"""


def test_collectives_by_hand() -> None:
    found = {one.kind: one for one in collectives(HLO)}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    # 5 rounds of the loop; the copy in another fusion is the same channel. Three quarters come from others.
    assert (gather.times, gather.group, gather.received) == (5, (0, 1, 2, 3), 32 * 8 * 2 * 3 / 4)
    assert (scatter.group, scatter.received) == (tuple(range(8)), 32 * 8 * 4 / 8 * 7)
    assert (found["all-reduce"].group, found["all-reduce"].received) == ((0, 4), 2 * 16 * 4 / 2)
    unsaid = HLO.replace(', backend_config={"known_trip_count":{"n":"5"}}', "").replace(
        "\n%again", "\n%cond (p: s32[]) -> pred[] {\n  %c.1 = s32[]{:T(128)} constant(7)\n}\n\n%again"
    )
    assert {one.kind: one for one in collectives(unsaid)}["all-gather"].times == 7
    third = HLO.replace("mesh['a'=2,'b'=4] {'a'}", "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}")
    assert {one.kind: one for one in collectives(third)}["all-reduce"].group == (0, 1, 2, 3)
    assert (found["all-to-all"].group, found["all-to-all"].received) == ((0, 4), 8 * 16 * 2 / 2)


STRAIGHT = """HloModule jit_f

%fused (p0: bf16[64,8], p1: s32[]) -> bf16[4,8] {
  %p0 = bf16[64,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %dynamic-slice.1 = bf16[4,8]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={4,8}
}

%written (p0: bf16[64,8], p1: bf16[2,8]) -> bf16[64,8] {
  %p0.1 = bf16[64,8]{1,0} parameter(0)
  %p1.1 = bf16[2,8]{1,0} parameter(1)
  ROOT %dynamic-update-slice.1 = bf16[64,8]{1,0} dynamic-update-slice(%p0.1, %p1.1, %c, %c)
}

ENTRY %main (a: bf16[64,8], b: bf16[2,8]) -> bf16[64,8] {
  %a = bf16[64,8]{1,0} parameter(0)
  %b = bf16[2,8]{1,0} parameter(1)
  %i = s32[]{:S(2)} constant(3)
  %fusion.1 = bf16[4,8]{1,0:S(1)} fusion(%a, %i), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"150"}
  %fusion.2 = bf16[64,8]{1,0} fusion(%a, %b), kind=kLoop, calls=%written, backend_config={"estimated_cycles":"50"}
  %slice-start.1 = ((bf16[64,8]{1,0}), bf16[16,8]{1,0:S(1)}, s32[1]{0}) slice-start(%a), slice={[0:16], [0:8]}
  %slice-done.1 = bf16[16,8]{1,0:S(1)} slice-done(%slice-start.1)
  %copy-start.1 = (bf16[64,8]{1,0:S(1)}, bf16[64,8]{1,0}, u32[]) copy-start(%fusion.2)
  ROOT %add.1 = bf16[64,8]{1,0} add(%fusion.2, %a)
}
"""


def test_traffic_by_hand() -> None:
    array = 64 * 8 * 2
    # The slice that a fusion reads; the change that one writes, read and written; a prefetched slice; a copy into the
    # fast memory; an addition of two arrays to a third.
    assert hbm_bytes(STRAIGHT) == 4 * 8 * 2 + 2 * (2 * 8 * 2) + 16 * 8 * 2 + array + 3 * array
    assert cycles(STRAIGHT) == 200


class Binary:
    """What a compiled program says of itself."""

    def cost_analysis(self) -> dict[str, float]:
        return {"flops": 1e6}

    def as_text(self) -> str:
        return HLO.replace('"n":"5"}}', '"n":"5"},"estimated_cycles":"3000"}')


def test_the_roofline_by_hand() -> None:
    figures = counted(Binary(), read_topology("v5e:2x4"), jax.devices()[:0])
    np.testing.assert_allclose(figures["compiler_seconds"], 2e-6)
    wire = 5 * 384 + 896 + 64 + 128
    assert figures["collective_bytes"] == wire
    np.testing.assert_allclose(figures["wire_seconds"], wire / 50e9)
    one, two = {"x": 3.0}, {"x": 5.0}
    assert extrapolated(one, two, 1) == {"x": 3.0}
    assert extrapolated(one, two, 10) == {"x": 21.0}
    chip = Chip("none", 10.0, 1.0, 5.0, 1.0, 1, 1, 1, 1.0)
    row = timed({"flops": 20.0, "bytes": 20.0, "wire_seconds": 3.0, "compiler_seconds": 3.5}, chip, hidden=True)
    assert (row["roofline_seconds"], row["estimate_seconds"]) == (4.0, 4.0)
    assert timed({**row, "compiler_seconds": 6.0}, chip, hidden=True)["estimate_seconds"] == 6.0
    assert timed({**row, "compiler_seconds": 6.0}, chip, hidden=False)["estimate_seconds"] == 9.0
    plan = {"tokens_per_second": 1000.0, "chips": 36}
    assert bill(plan, 1e6, 2.0) == {"tokens": 1e6, "chip_hours": 10.0, "price": 2.0, "bill": 20.0}


def test_the_compilers_words_in_ours() -> None:
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (19.69G) exceeds "
        "available HBM (15.75G)."
    )
    assert "update: expected at most 15.75G of HBM a chip, got 19.69G; use" in str(
        check_compiled("update", RuntimeError(said))
    )
    assert "Used" not in str(check_compiled("update", RuntimeError("Used 17.2G of 15.75G hbm. Exceeded")))
    assert (
        str(check_compiled("update", RuntimeError("other\nwords"))) == "update: the compiler rejected it: other words"
    )


KERNELS = """HloModule jit_f

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %splash_mha_fwd_segmented_residuals.1 = (f32[2,512,128]{2,1,0}, bf16[2,8,1024,128]{3,2,1,0}) custom-call(%a, %b), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2,2]{2,1,0}, s8[1,2,2]{2,1,0}, \
bf16[2,8,1024,128]{3,2,1,0}, bf16[2,2,1024,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}
  ROOT %splash_mha_dkv_segmented_no_residuals.2 = (f32[2,512,128]{2,1,0}) custom-call(%a, %b), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,2]{2,1,0}, s8[1,1,2]{2,1,0}, \
bf16[8,512,256]{2,1,0}, bf16[2,1024,256]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, backend_config={"estimated_cycles":"70"}
  %fusion.1 = f32[4]{0} fusion(%p), kind=kLoop, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, backend_config={"estimated_cycles":"5"}
}
"""


def test_kernels_by_hand() -> None:
    found = kernels(KERNELS, "v5e")
    assert found["kernels"] == 2
    # Two rows of 8 heads, three of four blocks, two products; one row of 8, the last 512 queries, so both blocks.
    forward, backward = 2 * 8 * 3, 8 * 2
    assert found["kernel_flops"] == (forward * 2 * 128 + backward * 4 * 256) * 2 * 512 * 512
    # A head of 256 is twice one of 128.
    assert found["kernel_cycles"] == forward * 2089 + backward * 2 * 2330
    # What stands behind a kernel's own words is read as well.
    assert cycles(KERNELS) == 75
    assert causal_blocks(1024, 1024, 128, 128) == 36
    assert causal_blocks(512, 512, 512, 512) == 1


def test_a_loop_takes_all_its_rounds() -> None:
    body = KERNELS.partition("ENTRY")[2].partition("{\n")[2]
    text = (
        "HloModule jit_f\n\n%body (p: f32[4]) -> f32[4] {\n"
        + body
        + "\n"
        + HLO.partition("\n\n")[2].partition("\n}\n\n")[2]
    )
    assert cycles(text) == 5 * 75
    assert kernels(text, "v5e")["kernels"] == 5 * 2


def test_auto_is_the_first_rematerialisation_that_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"dots": 20 * 2**30, "full": 7 * 2**30}
    tried: list[str] = []

    def planned(work: Work, topology: Topology, **settings: Any) -> dict[str, Any]:
        tried.append(work.model.remat)
        if work.row_length == 16 and work.model.remat == "dots":
            raise TooLarge("update: expected at most 15.75G of HBM a chip, got 19.69G; use less")
        size = sizes[work.model.remat]
        return {"fits": size <= topology.chip.memory, "programs": {"update": {"hbm_bytes": size}}}

    monkeypatch.setattr("rlhf_jax.cli.planning.make_plan", planned)
    mesh = {"data": 1, "fsdp": 8, "tensor": 1}

    def first(topology: str, **settings: Any) -> str:
        tried.clear()
        config = Config(model="gpt2", stage="sft", topology=topology, **settings)
        return first_that_fits(config, mesh, read_topology(topology))[0]

    assert (first("v5p:2x2x2"), tried) == ("dots", ["dots"])
    assert capsys.readouterr().err == ""
    assert (first("v5e:2x4"), tried) == ("full", ["dots", "full"])
    assert capsys.readouterr().err == "--remat dots does not fit (20.0 GiB a chip); continuing with --remat full\n"
    assert first("v5p:2x2x2", row_length=16) == "full"
    assert "(update: expected at most 15.75G of HBM a chip, got 19.69G)" in capsys.readouterr().err
    assert (first("v5e:2x4", remat="dots"), tried) == ("dots", ["dots"])
    assert (first("v5e:2x4", only="time"), tried) == ("full", ["full"])


def test_the_command_refuses_before_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(**settings: Any) -> None:
        run(Config(**({"model": "gpt2", "stage": "sft", "topology": "v5e:2x4"} | settings)))

    refused: list[tuple[dict[str, Any], str]] = [
        ({"mesh": "fsdp=4"}, "use --mesh fsdp=8"),
        ({"mesh": "depth=4"}, "mesh: expected axes .*, got 'depth=4'"),
        ({"batch": 9}, "use --batch 8"),
        ({"row_length": 4096}, "use --row-length 1024"),
        ({"model": "gpt9"}, "expected one of llama3-8b"),
    ]
    for settings, wanted in refused:
        with pytest.raises(UserError, match=wanted):
            plan(**settings)
    assert written({"data": 2, "fsdp": 4, "tensor": 1}) == "data=2,fsdp=4"
    # A search does not take a missing compiler, or settings that no mesh can have, for a model that is too large.
    with pytest.raises(UserError, match=r"v5e:2x4: the TPU compiler .* `pip install libtpu` adds it"):
        plan(search=True)
    monkeypatch.setattr("rlhf_jax.cli.planning.pod_devices", lambda topology: ())
    with pytest.raises(UserError, match="use --batch 8"):
        plan(search=True, batch=9)


def drawn(config: ModelConfig) -> Any:
    """Parameters of a size that shows, without a program that draws them."""
    random, shapes = np.random.default_rng(0), jax.eval_shape(init_params, Transformer(config), jax.random.key(0))
    return jax.tree.map(lambda leaf: random.normal(scale=0.25, size=leaf.shape).astype(np.float32), shapes)


def test_the_loss_in_chunks_is_the_loss() -> None:
    tokens = np.random.default_rng(3).integers(0, 64, (8, 14), np.int32)
    rows = TokenBatch(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool))
    weights = np.sin(np.arange(8.0 * 13, dtype=np.float32)).reshape(8, 13)

    def loss(params: Any, model: Transformer) -> Any:
        real = np.ones((8, 14), bool)
        episodes = padded_episodes(rows.tokens_BT, jnp.asarray(real), jnp.asarray(real[:, 1:]), None)
        response, entropy = response_losses(model, params, episodes, temperature=0.7)
        total, losses = jnp.sum(response * weights) + 0.1 * jnp.sum(entropy), [response]
        # Whose chunks are those of the other loss: once is enough.
        if not model.config.scan_layers:
            losses.append(target_losses(model, params, rows)[0])
            total += jnp.sum(losses[1] * weights)
        return total, losses

    for scan in (False, True):
        plain = dataclasses.replace(SMALL, scan_layers=scan, layers=1)

        @jax.jit
        def both(params: Any, plain: ModelConfig = plain) -> Any:
            models = (Transformer(plain), Transformer(dataclasses.replace(plain, head_chunk=4)))
            return [jax.value_and_grad(loss, has_aux=True)(params, model) for model in models]

        one, other = jax.tree.map(np.asarray, both(drawn(plain)))
        ((total, losses), gradient), ((same, parts), other_gradient) = one, other
        np.testing.assert_allclose(total, same, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), losses, parts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, other_gradient)


def test_positions_at_a_time_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert positions_at_a_time(SMALL, 1024, 1024) == 1024  # 256 MiB of logits, just
    assert positions_at_a_time(SMALL, 1024, 1025) == 513  # two parts
    assert positions_at_a_time(dataclasses.replace(SMALL, vocab_size=49152), 8, 1024) == 147  # 170 fit
    assert positions_at_a_time(dataclasses.replace(SMALL, head_chunk=0), 1024, 2048) == 2048
    assert positions_at_a_time(dataclasses.replace(SMALL, head_chunk=7), 1, 2048) == 7
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 4 * 8 * 64 * 3)  # of three positions of eight rows
    assert positions_at_a_time(SMALL, 8, 10) == 3  # four parts
    with jax.set_mesh(make_mesh(data=2)):
        assert positions_at_a_time(SMALL, 8, 10) == 5  # six fit
    with jax.set_mesh(make_mesh(fsdp=2, tensor=2)):
        assert positions_at_a_time(SMALL, 8, 12) == 12
    monkeypatch.setattr(logprobs, "LOGITS_BYTES", 1)
    assert positions_at_a_time(SMALL, 8, 10) == 1


def test_a_chunk_is_checked() -> None:
    with pytest.raises(UserError, match=r"head_chunk: expected .*, got -1"):
        dataclasses.replace(SMALL, head_chunk=-1)


def test_weights_laid_out_for_decoding_sample_the_same() -> None:
    # Two key heads: over four parts the rows of the cache are spread instead.
    model = Transformer(dataclasses.replace(SMALL, scan_layers=True))
    params = drawn(model.config)
    prompts = PromptBatch(np.random.default_rng(1).integers(2, 64, (16, 5), np.int32), np.ones((16, 5), bool))

    def sampled(parts: int) -> Any:
        config = EpisodeConfig(response_length=9, decode_parts=parts)
        key = jax.random.key(2)
        return jax.jit(lambda params, prompts: sample(model, params, prompts, key, config, eos_id=0, pad_id=1))

    alone = sampled(0)(params, prompts)
    mesh = make_mesh(data=2, fsdp=4)
    placed, spread = place(params, mesh), shard_rows(prompts, mesh)
    for parts in (0, 2, 4):
        with jax.set_mesh(mesh):
            step = sampled(parts).lower(placed, spread).compile()
            out = step(placed, spread)
        np.testing.assert_array_equal(alone.tokens, out.tokens, err_msg=str(parts))
        np.testing.assert_allclose(alone.logp, out.logp, atol=1e-5, err_msg=str(parts))
        in_loops = [one for one in collectives(str(step.as_text())) if one.times >= 8 and one.kind == "all-gather"]
        # What fsdp cuts is gathered at each token only where it is left so.
        weights = [one for one in in_loops if any(sorted(shape)[-2:] == [16, 32] for _, shape in one.shapes)]
        assert bool(weights) == (parts == 0), (parts, weights)


def test_parts_that_do_not_divide() -> None:
    params, mesh = drawn(SMALL), make_mesh(fsdp=8)
    prompts = PromptBatch(np.ones((8, 4), np.int32), np.ones((8, 4), bool))
    config = EpisodeConfig(response_length=4, decode_parts=3)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="decode_parts: expected a divisor of the 8 devices of the axis fsdp, got 3"),
    ):
        sample(Transformer(SMALL), place(params, mesh), prompts, jax.random.key(0), config, eos_id=0, pad_id=1)
    with pytest.raises(UserError, match=r"decode_parts: expected .*, got -1"):
        EpisodeConfig(decode_parts=-1)

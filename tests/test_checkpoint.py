"""What is saved comes back bit for bit, onto the devices asked for, or not at all."""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.arrays import TrainState
from rlhf_jax.errors import UserError
from rlhf_jax.runs import checkpoint
from rlhf_jax.runs.checkpoint import Checkpoints, fingerprint, load_params, load_step

pytestmark = pytest.mark.core

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed: int = 0, width: int = 8, **extras: Any) -> TrainState:
    kernel = np.random.default_rng(seed).normal(size=(width, 4)).astype(np.float32)
    params = {
        "layer_0": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(4, jnp.bfloat16)},
        "scale": jnp.float32(0.5),
    }
    return TrainState(
        jnp.int32(seed), params, OPTIMIZER.init(params), jax.random.key(seed), {"kl_coef": jnp.float32(0.1), **extras}
    )


def paths(tree: Any) -> Any:
    return jax.tree_util.tree_leaves_with_path(tree)


def same(a: Any, b: Any) -> bool:
    def data(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    pairs = zip(jax.tree.leaves(jax.tree.map(data, a)), jax.tree.leaves(jax.tree.map(data, b)), strict=True)
    # Trees of another structure have other paths.
    return [p for p, _ in paths(a)] == [p for p, _ in paths(b)] and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs
    )


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = make_state(1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, state, {})
    restored = checkpoints.restore(make_state(2))
    assert same(restored, state)
    assert not same(restored, make_state(2))
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)


def test_nothing_saved_gives_the_template(tmp_path: Path) -> None:
    template = make_state()
    assert Checkpoints(tmp_path / "none").restore(template) is template


def test_the_template_says_where_arrays_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    template = jax.tree.map(lambda x: jax.device_put(x, rows if x.shape == (8, 4) else whole), make_state(2))
    restored = checkpoints.restore(template)
    assert same(restored, make_state(1))
    assert restored.params["layer_0"]["kernel"].sharding == rows
    checkpoints.save(2, restored, {})
    assert same(checkpoints.restore(make_state(2)), make_state(1))


def test_params_are_handed_on_without_a_template(tmp_path: Path) -> None:
    state = make_state(1)
    Checkpoints(tmp_path).save(1, state, {})
    params = load_params(tmp_path)
    assert same(params, jax.tree.map(np.asarray, state.params))
    assert isinstance(params["layer_0"]["kernel"], np.ndarray)
    assert fingerprint(params) == fingerprint(state.params) != fingerprint(make_state(2).params)


def test_another_state_is_refused_by_its_leaf(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), {})
    others: list[tuple[dict[str, Any], str]] = [
        ({"width": 9}, r"params.layer_0.kernel: expected float32\[9, 4\], got float32\[8, 4\]"),
        ({"kl_coef": np.float16(0)}, r"extras.kl_coef: expected float16\[\], got float32\[\]"),
        ({"ema": np.float32(0)}, r"extras.ema: expected float32\[\], got nothing"),
    ]
    for other, message in others:
        with pytest.raises(UserError, match=message):
            checkpoints.restore(make_state(**other))


def test_what_would_come_back_changed_is_not_saved(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for leaf, message in [
        (jnp.asarray(0.1), "weakly typed"),
        (np.float64(0.1), "float64"),
        (0.1, "expected an array, got float"),
    ]:
        with pytest.raises(TypeError, match=f"extras.kl_coef.*{message}"):
            checkpoints.save(1, make_state(kl_coef=leaf), {})
    assert checkpoints.latest() is None


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2, best_metric="eval/loss")
    for step, loss in enumerate([3.0, 1.0, 2.0, float("nan"), 4.0], start=1):
        checkpoints.save(step, make_state(step), {"eval/loss": loss})
    assert checkpoints.steps() == [2, 4, 5]
    assert (checkpoints.latest(), checkpoints.best()) == (5, 2)
    assert same(load_params(tmp_path, "best"), make_state(2).params)
    assert same(checkpoints.restore(make_state(), step=2), make_state(2))
    with pytest.raises(UserError, match=r"step: expected one of the saved steps \[2, 4, 5\], got 3"):
        checkpoints.restore(make_state(), step=3)
    # The number is that of the parameters that are read, also where the best ones are damaged.
    damage(next((tmp_path / "00000002" / "params" / "d").iterdir()))
    step, params = load_step(tmp_path, "best")
    assert step == 5 and same(params, make_state(5).params)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_no_flipped_bit_is_restored(tmp_path: Path) -> None:
    Checkpoints(tmp_path / "good").save(1, make_state(1), {})
    files = [path for path in (tmp_path / "good" / "00000001").rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        shutil.copytree(tmp_path / "good", tmp_path / "bad", dirs_exist_ok=True)
        damage(tmp_path / "bad" / file.relative_to(tmp_path / "good"))
        with pytest.raises(UserError, match="damaged"):
            Checkpoints(tmp_path / "bad").restore(make_state(), step=1)


def test_a_damaged_newest_step_falls_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), {})
    damage(next((tmp_path / "00000002" / "params" / "d").iterdir()))
    with caplog.at_level(logging.WARNING):
        assert same(load_params(tmp_path), make_state(1).params)
        assert same(checkpoints.restore(make_state()), make_state(1))
    assert all("00000002 is damaged" in record.getMessage() for record in caplog.records)
    # Set aside: the next start does not meet it again, and its step can be saved anew.
    assert checkpoints.steps() == [1]
    checkpoints.save(2, make_state(2), {})
    assert same(checkpoints.restore(make_state()), make_state(2))
    (tmp_path / "00000001" / "manifest.json").unlink()
    (tmp_path / "00000002" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"none of the checkpoints \[1, 2\] is intact"):
        checkpoints.restore(make_state())


def test_what_a_kill_left_behind_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    (tmp_path / "00000002.unfinished" / "params").mkdir(parents=True)
    (tmp_path / "00000001").rename(tmp_path / "00000001.replaced")  # killed between the two renames of a replacement
    assert checkpoints.steps() == []
    checkpoints.close()
    assert same(checkpoints.restore(make_state()), make_state(1))
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]


def test_a_step_saved_in_the_background_is_the_state_as_it_was(tmp_path: Path) -> None:
    # Large enough to be still in the writing when the updates overwrite what was donated.
    state = make_state(1, width=1_000_000)
    expected = jax.tree.map(np.array, state.params)

    @functools.partial(jax.jit, donate_argnums=0)
    def halve(state: TrainState) -> TrainState:
        return dataclasses.replace(state, params=jax.tree.map(lambda x: x / 2, state.params))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_in_background(1, state, {})
    for _ in range(3):
        state = jax.block_until_ready(halve(state))
    checkpoints.finish()
    assert same(load_params(tmp_path), expected)


def test_one_save_at_a_time_and_a_step_is_listed_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, sealed, hold = Checkpoints(tmp_path, keep_last=1), checkpoint.seal, threading.Event()

    def held(*args: Any) -> None:
        assert hold.wait(60)
        sealed(*args)

    monkeypatch.setattr(checkpoint, "seal", held)
    checkpoints.save_in_background(1, make_state(1), {})
    checkpoints.check()
    assert checkpoints.steps() == [] and [path.name for path in tmp_path.iterdir()] == ["00000001.unfinished"]
    threading.Timer(0.3, hold.set).start()
    checkpoints.save_in_background(2, make_state(2), {})
    assert hold.is_set() and 1 in checkpoints.steps()
    assert same(checkpoints.restore(make_state()), make_state(2))  # waits for it
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]


@contextlib.contextmanager
def no_room_to_sync(patch: pytest.MonkeyPatch) -> Iterator[None]:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(checkpoint, "seal", full)
    yield


@contextlib.contextmanager
def no_room_for_arrays(patch: pytest.MonkeyPatch) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_room_at_all(patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.setattr(checkpoint.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    yield


def test_a_full_disk_leaves_the_step_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    for refusal, message in (
        (no_room_to_sync, r"step 2 could not be saved: No space left on device; the last .* step 1"),
        (no_room_for_arrays, r"step 2 could not be saved: File too large; the last .* step 1"),
        (no_room_at_all, r"step 2 needs \d+ bytes, the disk has 100"),
    ):
        with pytest.MonkeyPatch.context() as patch, refusal(patch), pytest.raises(UserError, match=message):
            checkpoints.save(2, make_state(2), {})
        assert [path.name for path in tmp_path.iterdir()] == ["00000001"], message
        assert same(checkpoints.restore(make_state()), make_state(1)), message


def test_a_full_disk_at_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with no_room_to_sync(monkeypatch), pytest.raises(UserError, match=r"left on device; there is no earlier one$"):
        Checkpoints(tmp_path).save(1, make_state(1), {})


DISK = """
import sys
from pathlib import Path
from rlhf_jax.errors import UserError
from rlhf_jax.runs.checkpoint import Checkpoints
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import JsonLines
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.test_checkpoint import make_state, same
import os

disk = Path(sys.argv[1])


def start():
    # What a command does that starts or resumes.
    run = RunFolder.create(disk / "run", stage="sft", config={}, model={}, tokenizer=Tokenizer.bytes(), inputs={})
    with run.lock():
        checkpoints, lines = Checkpoints(run.checkpoints), JsonLines(run.metrics)
        step = int(checkpoints.restore(make_state()).step) if checkpoints.steps() else 0
        lines.start(step, 9)
        lines.row(step + 1, {"loss": 1.0})
        lines.close()
        checkpoints.save(step + 1, make_state(step + 1), {})
    return run


print(start().path)
saved = refused = 0
for room in (0, 4, 8, 12, 24, 40, 64, 76, 88, 100, 112, 300):
    stat = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * max(stat.f_bavail * stat.f_bsize - room * 1024, 0))
    try:
        start()
        saved += 1
    except UserError as error:
        refused += 1
        assert "\\n" not in str(error), error
    except OSError as error:
        refused += 1
        assert error.filename and error.strerror == "No space left on device", error
    (disk / "filler").unlink()
    steps = Checkpoints(disk / "run" / "checkpoints").steps()
    assert same(Checkpoints(disk / "run" / "checkpoints").restore(make_state()), make_state(steps[-1])), room
    assert not [path for path in disk.rglob("*") if path.name.endswith((".unfinished", ".partial"))], room
assert saved > 0 and refused > 6, (saved, refused)
"""


def test_any_size_of_a_full_disk_is_one_line_and_can_be_resumed(tmp_path: Path) -> None:
    # A disk of its own, in a namespace of its own.
    command = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1000k disk "$1" && exec "$2" -c "$3" "$1"', "sh"]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("this system has no mount namespaces for users")
    done = subprocess.run(
        [*command, str(tmp_path), sys.executable, DISK], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/run\n", ""), done.stderr[-3000:]


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    for read in (lambda: checkpoints.restore(make_state()), lambda: load_params(tmp_path)):
        with pytest.raises(UserError, match="format_version: expected 2, got 1"):
            read()

"""A sealed folder gives no changed byte away as whole."""

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_jax.data.ledger import Ledger
from rlhf_jax.errors import UserError
from rlhf_jax.files import write_file
from rlhf_jax.runs.atomic_files import Damaged, read_json, read_manifest, seal, verify, write_json
from rlhf_jax.runs.folder import RunFolder
from rlhf_jax.runs.metrics import JsonLines
from rlhf_jax.tokenizers.bpe import Tokenizer
from tests.cases import case

pytestmark = pytest.mark.core


def make_sealed(folder: Path) -> Path:
    (folder / "params" / "deep").mkdir(parents=True)
    (folder / "params" / "deep" / "array").write_bytes(bytes(range(64)))
    (folder / "training").write_bytes(b"x")
    seal(folder, {"step": 3})
    return folder


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    return make_sealed(tmp_path)


def test_about_comes_back_with_the_files(sealed: Path) -> None:
    manifest = verify(sealed)
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"params/deep/array", "training"}


def test_every_mutation_is_seen(tmp_path: Path) -> None:
    for number, (how, name) in enumerate(
        (how, name)
        for how in ("flip", "truncate", "delete")
        for name in ("params/deep/array", "training", "manifest.json")
    ):
        sealed = make_sealed(tmp_path / f"{number}")
        path = sealed / name
        content = bytearray(path.read_bytes())
        if how == "delete":
            path.unlink()
        elif how == "truncate":
            path.write_bytes(content[:-1] if name != "manifest.json" else content[:-3])
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        with pytest.raises(Damaged, match=name):
            verify(sealed)
            pytest.fail(f"not seen: {how} {name}")


def test_a_part_is_checked_alone(sealed: Path) -> None:
    (sealed / "training").write_bytes(b"y")
    assert verify(sealed, "params")["step"] == 3
    with pytest.raises(Damaged):
        verify(sealed)


def test_a_manifest_of_anything_else_is_damage(sealed: Path) -> None:
    for text in ("[]", "{}", "null", "[" * 100_000, '{"sha256": 1}', '{"sha256": "", "files": {}}'):
        (sealed / "manifest.json").write_text(text)
        with pytest.raises(Damaged):
            read_manifest(sealed)
            pytest.fail(f"taken for a manifest: {text[:40]}")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"β": 0.05})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"β": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"β": 0.05}
    assert [child.name for child in tmp_path.iterdir()] == ["summary.json"]


def test_reading_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"a": ')
    for name in ("torn.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            read_json(tmp_path / name)


def test_every_file_is_whole_or_as_it_was_and_leftovers_block_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, ledger = Tokenizer.bytes(), Ledger()
    lines = JsonLines(tmp_path / "metrics.jsonl")

    def rows(path: Path) -> None:
        path.write_text("torn\n")  # what is not at the end cannot be cut off in place
        lines.row(1, {"loss": 1.0})
        lines.close()
        lines.start(1, 2)

    synced: list[int] = []
    fsync = os.fsync

    def watched(fd: int) -> None:
        synced.append(os.fstat(fd).st_mode)
        fsync(fd)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writers: dict[str, Callable[[Path], object]] = {
        "file.txt": lambda path: write_file(path, "ünï\r\n"),
        "summary.json": lambda path: write_json(path, {"a": 1}),
        "tokenizer.json": tokenizer.save,
        "ledger.json": ledger.save,
        "metrics.jsonl": rows,
    }
    for name, write in writers.items():
        with case(name):
            path, left = tmp_path / name, tmp_path / f"{name}.unfinished"
            left.write_text("torn")
            synced.clear()
            with monkeypatch.context() as patched:
                patched.setattr(os, "fsync", watched)
                write(path)
            # The file, and the folder after its rename.
            assert any(map(stat.S_ISREG, synced)) and stat.S_ISDIR(synced[-1]) and not left.exists()
            path.write_bytes(before := b"before")

            with monkeypatch.context() as patched:
                patched.setattr(os, "fsync", full)
                with pytest.raises(OSError, match="No space left on device") as end:
                    write(path)
            assert end.value.filename == str(path.resolve()) and not left.exists()
            assert name == "metrics.jsonl" or path.read_bytes() == before
            lines.close()
    write_file(tmp_path / "file.txt", "ünï\r\n")
    assert (tmp_path / "file.txt").read_bytes() == "ünï\r\n".encode()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", "through")
    assert os.read(reader, 99) == b"through" and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    os.close(reader)
    (tmp_path / "link").symlink_to("file.txt")
    write_file(tmp_path / "link", "followed")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file.txt").read_text() == "followed"
    for name in ("tokenizer.json.partial", "tokenizer.json.unfinished", "config.json.unfinished"):
        with case(name):
            folder = tmp_path / name.replace(".", "_")
            folder.mkdir()
            (folder / name).write_text("torn")
            RunFolder.create(folder, stage="sft", config={}, model={}, tokenizer=tokenizer, inputs={})
            assert not (folder / name).exists()

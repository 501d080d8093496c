"""A sealed folder gives no changed byte away as whole."""

import json
from pathlib import Path

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.runs.atomic_files import Damaged, read_json, read_manifest, seal, verify, write_json

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

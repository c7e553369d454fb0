import pytest

from hga_flax.runs.manifest import find_damage, write_manifest


@pytest.fixture
def folder(tmp_path):
    for name in ("state/d/a", "state/m", "run/metadata"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 10)
    write_manifest(tmp_path, 7)
    return tmp_path


def test_what_is_whole_has_no_damage(folder):
    (folder / "notes").write_text("beside the items: not sealed")
    assert find_damage(folder, 7) is None and find_damage(folder, 7, "run") is None


@pytest.mark.parametrize("name", ["state/d/a", "state/m", "run/metadata"])
def test_every_byte_of_every_file_counts(folder, name):
    content = (folder / name).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << (position % 8)
        (folder / name).write_bytes(bytes(changed))
        assert find_damage(folder, 7) == f"the content of {name} has changed"
    (folder / name).write_bytes(content[:-1])
    assert find_damage(folder, 7) == f"{name} has {len(content) - 1} bytes instead of {len(content)}"
    (folder / name).unlink()
    assert find_damage(folder, 7) == f"{name} is missing"
    assert (find_damage(folder, 7, "run") is None) == (name != "run/metadata")


def test_the_step_is_sealed_too(folder):
    assert "the checkpoint of step 7 under another name" in find_damage(folder, 8)
    assert find_damage(folder / "nowhere", 7) == "it is not a folder"

"""Ways in which a checkpoint is damaged on a disk, and what is said of each."""

import os
import pathlib
import shutil


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def each(pattern, change):
    def damage(folder):
        files = sorted(f for f in folder.glob(pattern) if f.is_file())
        assert files
        for file in files:
            change(file)

    return damage


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def scramble(file):
    file.write_bytes(os.urandom(file.stat().st_size))


def replace(folder, by):
    shutil.rmtree(folder)
    by(folder)


def copy_part(folder):
    whole = folder.rename(folder.with_name("whole"))
    for file in sorted(f for f in whole.rglob("*") if f.is_file())[::2]:
        target = folder / file.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    shutil.rmtree(whole)


# Of the newer of two checkpoints, 1 and 2: (what is done to its folder, the step that is restored, what is said).
# Orbax writes commit markers and notes that it does not need to read the arrays.
DAMAGE = {
    "truncated array files": (each("state/**/d/*", halve), 1, "bytes instead of"),
    "truncated everything": (each("state/**/*", halve), 1, "bytes instead of"),
    "zero-length array files": (each("state/**/d/*", lambda f: os.truncate(f, 0)), 1, "has 0 bytes instead of"),
    "array files gone": (each("state/**/d/*", lambda f: f.unlink()), 1, "is missing"),
    "one bit of each array file": (each("state/**/d/*", flip), 1, "the content of state/"),
    "garbage in an array file": (each("state/d/*", scramble), 1, "content of"),
    "_METADATA gone": (each("state/_METADATA", lambda f: f.unlink()), 1, "state/_METADATA is missing"),
    "one bit of _METADATA": (each("state/_METADATA", flip), 1, "the content of state/_METADATA has changed"),
    "array database's manifest gone": (each("state/manifest.ocdbt", lambda f: f.unlink()), 1, "is missing"),
    "state gone": (lambda f: shutil.rmtree(f / "state"), 1, "is missing"),
    "run gone": (lambda f: shutil.rmtree(f / "run"), 1, "is missing"),
    "run broken": (each("run/metadata", lambda f: f.write_text("{")), 1, "bytes instead of"),
    "one bit of run": (each("run/metadata", flip), 1, "has changed"),
    "seal gone": (each("seal.json", lambda f: f.unlink()), 1, "it has no seal.json"),
    "seal broken": (each("seal.json", lambda f: f.write_text('{"step": 2')), 1, "its seal.json is damaged"),
    "seal of another kind": (each("seal.json", lambda f: f.write_text("[2]")), 1, "its seal.json is damaged"),
    "half-written": (copy_part, 1, "is missing"),
    "empty folder": (lambda f: replace(f, pathlib.Path.mkdir), 1, "it has no seal.json"),
    "a file in its place": (lambda f: replace(f, lambda f: f.write_text("x")), 1, "it is not a folder"),
    "another step's name": (lambda f: f.rename(f.with_name("500")), 1, "the checkpoint of step 2 under another name"),
    "no step's name": (lambda f: f.rename(f.with_name("2.bak")), 1, "step 2, which was complete, is gone"),
    "deleted": (shutil.rmtree, 1, "step 2, which was complete, is gone"),
    "an empty folder with a huge number": (lambda f: f.with_name("9" * 20).mkdir(), 2, "it has no seal.json"),
    "a temporary folder of a killed write": (lambda f: f.with_name("3.orbax-checkpoint-tmp").mkdir(), 2, None),
    "folders that are no checkpoints": (lambda f: [f.with_name(n).mkdir() for n in ("x", "-3", "07", "٣")], 2, None),
    "Orbax's own notes gone": (each("*[ST]*", lambda f: f.unlink()), 2, None),
    "commit markers gone": (each("commit_success.txt", lambda f: f.unlink()), 2, None),
}  # fmt: skip

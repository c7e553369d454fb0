"""Copies files between this machine and buckets, `gs://bucket/folder` and `s3://bucket/folder`.

An object store can neither rename nor append, so no file is used in a bucket: files are copied to this machine, used
there and copied back. The file systems are fsspec's, which etils.epath uses too. They are called directly, because
epath prefers TensorFlow's file systems if TensorFlow is installed, and lists names without sizes.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import os
import pathlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from hga_flax.errors import FULL, NOT_AWAITED, TemporaryError, UserError, alias, expand, one_line

CACHE_VARIABLE = "HGA_FLAX_CACHE"
# Scheme: (the package that implements it, how to authenticate).
SCHEMES = {
    "gs": ("gcsfs", "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"),
    "s3": ("s3fs", "aws configure, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
}
# The storage's checksum of what it received is compared with ours, for gcsfs only if asked to; s3fs always does it.
CHECKED = {"gs": {"consistency": "md5"}}
# Without limits gcsfs would wait for an answer for ever. It tries six times; a file that it reads in parts, which it
# does unless told not to, six times six times. s3fs has limits of its own.
PATIENCE = {"gs": {"sock_connect": 30.0, "sock_read": 30.0}}  # seconds, see aiohttp.ClientTimeout
IN_ONE = {"gs": {"concurrency": 1}}
BROKEN_OFF = ("ClientPayloadError", "ContentLengthError", "IncompleteReadError", "ResponseStreamingError")
AT_ONCE = 8  # files transferred in parallel
FIRST_ANSWER_SECONDS = 60.0  # s3fs itself gives up after 7 s, gcsfs after 35 to 50 s
SMALL = 1 << 25  # bytes; up to this size a file is read before it is sent, because it may grow meanwhile


class Unreachable(TemporaryError):
    """A bucket cannot be read or written."""


class Fact(NamedTuple):
    """What is known of a file without reading it: its size in bytes, and a mark that changes with its content."""

    size: int
    mark: str


def is_remote(path: str) -> bool:
    """Returns whether a path is an address in a bucket."""
    return path.partition("://")[0] in SCHEMES and "://" in path


def cache_folder() -> pathlib.Path:
    """Returns the folder on this machine for local copies of files in buckets."""
    return expand(os.environ.get(CACHE_VARIABLE) or "~/.cache/hga_flax", CACHE_VARIABLE).absolute()


def folder_name(address: str) -> str:
    """Returns a folder name for the local copy of an address, unique to that address."""
    return f"{address.rstrip('/').rpartition('/')[2]}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


class Remote:
    """A folder in a bucket. Every method raises `Unreachable`, with a one-line message that says what to do.

    Args:
        address: `gs://BUCKET/...` or `s3://BUCKET/...`.
        key: the flag or key that messages name, such as "--workdir".

    Raises:
        UserError: the address is invalid, or the package for it is not installed.
    """

    def __init__(self, address: str, key: str):
        scheme, _, path = address.partition("://")
        parts = [part for part in path.split("/") if part]
        if not parts or ".." in parts or "." in parts:
            raise UserError(f"{key}={address}: write {scheme}://BUCKET/FOLDER")
        self.address, self.key = f"{scheme}://{'/'.join(parts)}", key
        self._package, self._login = SCHEMES[scheme]
        self._scheme, self._root = scheme, "/".join(parts)
        self._checked = CHECKED.get(scheme, {})
        if importlib.util.find_spec(self._package) is None:
            raise UserError(f"{key}={address}: needs the package {self._package}: pip install {self._package}")
        self._system: Any = None

    def below(self, name: str) -> "Remote":
        """Returns a subfolder."""
        return Remote(f"{self.address}/{name}", self.key)

    def _fs(self) -> Any:
        if self._system is None:
            import fsspec

            limits: dict[str, Any] = {}
            if self._scheme in PATIENCE:
                import aiohttp

                limits["requests_timeout"] = aiohttp.ClientTimeout(total=None, **PATIENCE[self._scheme])
            self._system = fsspec.filesystem(self._scheme, use_listings_cache=False, **limits)
        return self._system

    def files(self) -> dict[str, Fact]:
        """Returns the facts of every file in this folder and below, by name relative to this folder.

        Raises:
            Unreachable: the bucket does not exist, cannot be read, or does not answer.
        """
        with self._reaching("cannot be read"):
            found = self._in_time(lambda: self._find() or self._nothing())
        prefix = f"{self._root}/"
        paths = {path.lstrip("/"): info for path, info in found.items()}
        if [(path, info["type"]) for path, info in paths.items()] == [(self._root, "file")]:
            raise UserError(f"{self.key}={self.address}: this is a file, not a folder")
        named = {path.removeprefix(prefix): info for path, info in paths.items() if path.startswith(prefix)}
        return {
            name: Fact(int(info["size"]), _mark(info))
            for name, info in named.items()
            if info["type"] == "file" and _safe(name)
        }

    def file(self, name: str) -> Fact | None:
        """Returns the facts of one file, or None if it does not exist.

        Raises:
            Unreachable: the bucket does not exist, cannot be read, or does not answer.
        """
        with self._reaching("cannot be read"):
            info = self._in_time(lambda: self._info(name) or self._nothing())
        return Fact(int(info["size"]), _mark(info)) if info and info["type"] == "file" else None

    def _info(self, name: str) -> dict[str, Any]:
        system = self._fs()
        system.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            return system.info(f"{self._root}/{name}")
        return {}

    def _find(self) -> dict[str, Any]:
        system = self._fs()
        system.invalidate_cache()
        return system.find(self._root, detail=True)

    def _nothing(self) -> dict[str, Any]:
        """Returns {} for an empty result, after checking that the bucket exists."""
        try:
            self._fs().ls(self._root.partition("/")[0])
        except OSError as error:  # access may be limited to a folder
            if not (isinstance(error, PermissionError) or "Forbidden" in str(error)):
                raise
        return {}

    def _in_time(self, ask: Callable[[], Any]) -> Any:
        """Returns what `ask` returns, or raises TimeoutError after FIRST_ANSWER_SECONDS."""
        answer: list[Any] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                answer.append(ask())
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run, daemon=True, name="bucket")
        thread.start()
        thread.join(FIRST_ANSWER_SECONDS)
        if failure:
            raise failure[0]
        if not answer:
            raise TimeoutError(f"no answer within {FIRST_ANSWER_SECONDS:g} s")
        return answer[0]

    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        with self._reaching("cannot be read", missing=True):
            return self._fs().cat_file(f"{self._root}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes a file."""
        with self._reaching("cannot be written to"):
            self._in_time(lambda: self._fs().pipe_file(f"{self._root}/{name}", content, **self._checked))

    def get(self, names: Iterable[str], folder: pathlib.Path, done: Callable[[str], None] = lambda name: None) -> None:
        """Copies files to the same names in `folder`, each atomically, and calls `done(name)` after each.

        Raises:
            FileNotFoundError: a file no longer exists.
        """

        def copy(name: str) -> None:
            file = folder / name
            part = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.part")  # of this attempt alone
            with self._reaching("cannot be read", missing=True):
                file.parent.mkdir(parents=True, exist_ok=True)
                self._get_whole(f"{self._root}/{name}", str(part))
                part.replace(file)
                done(name)

        _all(copy, names)

    def _get_whole(self, there: str, here: str) -> None:
        """Copies a file, again if the connection breaks off in the middle, which s3fs does not try itself."""
        for last in (False, False, True):
            try:
                return self._fs().get_file(there, here, **IN_ONE.get(self._scheme, {}))
            except Exception as error:
                if last or type(error).__name__ not in BROKEN_OFF:
                    raise

    def put(self, folder: pathlib.Path, names: Iterable[str]) -> None:
        """Uploads files of `folder` under the same names.

        Raises:
            FileNotFoundError: a file is no longer in the folder.
        """

        def copy(name: str) -> None:
            file, there = folder / name, f"{self._root}/{name}"
            with self._reaching("cannot be written to", missing=True):
                content = file.read_bytes() if file.stat().st_size <= SMALL else None
            with self._reaching("cannot be written to"):
                if content is None:
                    self._fs().put_file(str(file), there, **self._checked)
                else:
                    self._fs().pipe_file(there, content, **self._checked)

        _all(copy, names)

    def copy(self, names: Iterable[str], old: str, new: str) -> None:
        """Copies `old/NAME` to `new/NAME` within the bucket."""

        def copy(name: str) -> None:
            with self._reaching("cannot be written to"):
                self._fs().cp_file(f"{self._root}/{old}/{name}", f"{self._root}/{new}/{name}")

        _all(copy, names)

    def delete(self, names: Iterable[str]) -> None:
        """Removes files; ignores those that do not exist."""

        def remove(name: str) -> None:
            with self._reaching("cannot be written to"), contextlib.suppress(FileNotFoundError):
                self._fs().rm_file(f"{self._root}/{name}")

        _all(remove, names)

    @contextlib.contextmanager
    def _reaching(self, what: str, *, missing: bool = False) -> Iterator[None]:
        """Turns the libraries' exceptions into a one-line `Unreachable`; `missing` lets FileNotFoundError pass."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if missing and isinstance(error, FileNotFoundError):
                raise
            raise Unreachable(f"{self.key}={self.address} {what}: {self._reason(error)}") from error

    def _reason(self, error: BaseException) -> str:
        kind, text = type(error).__name__, one_line(error)[:300]
        code = getattr(error, "code", None)
        if isinstance(error, FileNotFoundError):
            return f"there is no bucket {self._root.partition('/')[0]}; create it, or correct the name"
        if "Credential" in kind or kind == "RefreshError" or str(code) == "401" or "Anonymous caller" in text:
            return f"no credentials, or invalid ones ({text}); {self._login}"
        if kind == "ChecksumError":
            return f"a file did not arrive there as it was sent ({text}); try again"
        if isinstance(error, OSError) and error.strerror and (error.filename or error.errno in FULL):
            return f"{error.filename or cache_folder()}: {error.strerror} (on this machine)"
        if isinstance(error, PermissionError) or str(code) == "403" or "Forbidden" in text:
            return f"no permission ({text}); ask for it, or: {self._login}"
        if isinstance(error, TimeoutError | ConnectionError) or "Connect" in kind or "Timeout" in kind:
            return f"the storage does not answer ({text or kind}); is the network up, and the endpoint right?"
        return f"{kind}: {text}"


def _mark(info: dict[str, Any]) -> str:
    """Returns a value that changes with the content: S3's ETag, GCS's generation, or the file's time."""
    return str(next((info[name] for name in ("ETag", "generation", "etag", "mtime", "created") if name in info), ""))


def _safe(name: str) -> bool:
    """Returns whether a file of this name stays inside the folder that it is copied to."""
    return not {"", ".", ".."} & set(name.split("/"))


def _all(work: Callable[[str], None], names: Iterable[str]) -> None:
    """Runs `work` for all names, several at once; after a failure it starts no more and raises the error.

    It waits for those in progress, unless a signal ends the command.
    """
    pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE, NOT_AWAITED)
    waits = False
    try:
        futures = [pool.submit(work, name) for name in names]
        done = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION).done
        waits = True
        for future in done:
            future.result()
    finally:
        pool.shutdown(waits, cancel_futures=True)


def check_space(folder: pathlib.Path, size: int, what: str) -> None:
    """Checks that `size` bytes fit on the folder's file system.

    Raises:
        UserError: they do not fit.
    """
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{what}: its {size / 1e9:,.1f} GB do not fit in {folder} ({free / 1e9:,.1f} GB are free); free some space "
            f"or set {CACHE_VARIABLE} to a folder on another disk"
        )


def make_folder(folder: pathlib.Path, address: str) -> pathlib.Path:
    """Creates the folder for the local copy of an address; messages then show the address instead of the folder.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{address} cannot be copied to {folder}: {error.strerror or one_line(error)}; set {CACHE_VARIABLE} to a "
            "folder that can be written to"
        ) from None
    alias(folder, address)
    return folder


def fetch_file(address: str, key: str) -> pathlib.Path:
    """Returns the local copy of one file, downloading it if it is new or has changed.

    Raises:
        UserError: the file does not exist or cannot be read.
    """
    folder, _, name = address.rpartition("/")
    remote = Remote(folder, key)
    fact = remote.file(name)
    if fact is None:
        raise UserError(f"{key}={address}: there is no such file")
    local = cache_folder() / "files" / f"{folder_name(address)}-{hashlib.sha256(fact.mark.encode()).hexdigest()[:12]}"
    if not (local / name).exists():
        make_folder(local, remote.address)
        check_space(local, fact.size, f"{key}={address}")
        try:
            remote.get([name], local)
        except FileNotFoundError:
            raise UserError(f"{key}={address}: it was removed while it was being copied") from None
    return local / name

"""Index of the tokens that `data prepare` has made for a run; they are sent to its pod.

Tokens are found by their content alone (tokens/token_cache.py). Here is only remembered what was made for which words,
so that the command line, which reads neither rows nor tokenizer, knows what to send. A wrong guess costs a transfer,
never wrong tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from runner.config import json_text
from runner.data import user_code
from runner.data.readers.sources import files_of
from runner.errors import RequestError
from runner.paths import cache_dir
from runner.rundir.directory import write_atomically
from runner.spec import RunSpec
from runner.spec.input_paths import is_url


def record_prepared(spec: RunSpec, entries: Sequence[Path]) -> None:
    """These folders of the cache hold the tokens of the run."""
    record = _record(spec)
    record.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(record, json.dumps([str(entry.relative_to(cache_dir())) for entry in entries]))


def prepared_folders(spec: RunSpec) -> list[str]:
    """Folders of the run's tokens, below the cache; none where nothing was prepared, or a file has changed since.

    None either where shards are made: a pod makes its own, of which the tokens would have to come out the same.
    """
    if spec.objective.sharded:
        return []
    with suppress(OSError, ValueError):
        found = [str(name) for name in json_text.loads(_record(spec).read_text("utf-8"))]
        if all((cache_dir() / name).is_dir() for name in found):
            return found
    return []


def _record(spec: RunSpec) -> Path:
    """Named by all that shapes the tokens, as far as a command line can tell."""
    train, model, data = spec.train, spec.model, spec.data.model_dump(exclude={"name", "num_proc"})
    own = [getattr(spec.objective, name, None) for name in ("name", "loss_on", "max_new_tokens", "tokenizer")]
    said = [
        data, own, model.id, model.revision, model.package, model.gguf_file, train.max_length, train.packing,
        train.seed, sorted(_states(spec)),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "prepared" / f"{digest}.json"


def _states(spec: RunSpec) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of change of every file on this machine that rows or the template come from; code of row
    formats too."""
    data = spec.data
    files = [data.chat_template, *user_code.sources_of_formats(data)]
    if data.source == "file":
        for path in (data.path, data.eval_path, *(source.path for source in data.sources)):
            if path is not None and not is_url(path):
                with suppress(RequestError):  # a folder or glob of another machine
                    files += files_of(path)
    for file in filter(None, files):
        with suppress(OSError):
            stat = Path(file).expanduser().stat()
            yield file, stat.st_size, stat.st_mtime_ns
